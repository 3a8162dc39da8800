"""Procedural endoscopy: labelled frames in the published layouts, so that every script runs
without a download.

    python synthetic.py data/synthetic                     the default set (made on first use)
    python synthetic.py OUT --videos 40 --frames-per-video 50 --seed 0
    python synthetic.py OUT --sheet sheet.png              a contact sheet of the classes
    python synthetic.py OUT --artefacts                    with what spoils real video

A scene is a signed distance to the mucosa of a bent tube along z (folds, blind end, orifice),
the scope's own shaft and polyps. Rays are sphere-traced from a camera with two things that every
endoscope has: a wide barrel-distorted lens and its own light, which falls off with the square of
the distance. Colour is a sum of absorptions (blood, vessels). Hue, brightness, anatomy and pose
are drawn per patient, place or frame, from ranges that the classes share, so that a class is
told by its structure.

The stem of a frame is <patient>_<n>: "patient12_3.jpg" (HyperKvasir, Kvasir-SEG) or
"UC_patient_12_3.bmp" (LIMUC).
"""
import argparse
import fcntl
import json
import math
import os
import shutil
import zlib
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

LANDMARKS = {  # folder name -> (tract, name in the official csv)
    "cecum": ("lower", "normal-cecum"), "ileum": ("lower", "ileum"),
    "retroflex-rectum": ("lower", "retroflex-rectum"),
    "pylorus": ("upper", "normal-pylorus"), "retroflex-stomach": ("upper", "retroflex-stomach"),
    "z-line": ("upper", "normal-z-line")}
MAYO_SHARE = (.54, .27, .11, .08)  # LIMUC
# fov: degrees between two edge midpoints; corner: |x| + |y| where corners are cut; gain: lamp,
# sensor
SCOPES = {
    1: dict(fov=125, barrel=.12, corner=1.55, round=9.0, vignette=.25, gain=(1.0, 1.0, 1.0),
            noise=.012, blur=1),
    2: dict(fov=150, barrel=-.10, corner=9.0, round=1.04, vignette=.55, gain=(.85, 1.05, 1.2),
            noise=.025, blur=2)}


# -----------------------------------------------------------------------------------------------
# What a patient looks like

def generator(*key):
    """The random generator of a key of strings and integers."""
    return np.random.default_rng([zlib.crc32(k.encode()) if isinstance(k, str) else k
                                  for k in key])


def appearance(rng):
    """Colour and optics that all frames of a patient share, whatever they show."""
    u = rng.uniform
    redness, yellow = u(.7, 1.6), u(-.05, .6)
    return SimpleNamespace(log_base=(-.12, -.12 - redness * .75, -.12 - redness * .8 - yellow),
                           exposure=u(.55, 1.25), gain=tuple(u(.88, 1.12, 3)), gloss=u(.3, 1.0),
                           mucus=u(-1, 1.4), bile=u(0, 1))


@lru_cache
def band(n, wavelength):
    """A band-pass filter for rfft2 of (n, n): one octave wide about a wavelength in pixels, none
    of the mean."""
    f = torch.hypot(torch.fft.fftfreq(n)[:, None], torch.fft.rfftfreq(n)[None])
    return (-2 * (f.clamp(min=1e-9) * wavelength).log() ** 2).exp()


def noise(rng, n, wavelength):
    """Periodic band-limited noise (n, n), zero mean, unit variance; wavelength in pixels."""
    white = torch.from_numpy(rng.standard_normal((2, n, n // 2 + 1), dtype=np.float32))
    real, imaginary = white * band(n, wavelength)
    x = torch.fft.irfft2(torch.complex(real, imaginary), s=(n, n))
    return x / x.std()


def vessels(rng, n, roots=9):
    """A vascular tree (n, n) in 0..1, periodic: branches that wander, thin out and fork, drawn
    at twice the size."""
    side = 2 * n
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    start, angle = rng.uniform(0, side, (roots, 2)), rng.uniform(0, 2 * math.pi, roots)
    width = rng.uniform(5, 8, roots)
    while len(start):  # one generation of branches at a time
        turns = rng.normal(0, .22, (len(start), int(8 + 4 * width.mean())))
        angles = angle[:, None] + turns.cumsum(1)
        steps = 9 * np.stack([np.cos(angles), np.sin(angles)], 2)
        points = start[:, None] + steps.cumsum(1)  # (branches, steps, 2)
        tiles = zip(points, points.min(1) // side, points.max(1) // side, width)
        for path, (i, j), (i_end, j_end), w in tiles:
            # What leaves at one side comes in at the other
            for shift in {(i, j), (i, j_end), (i_end, j), (i_end, j_end)}:
                corners = (path - np.multiply(shift, side)).ravel().tolist()
                draw.line(corners, min(255, int(110 + 20 * w)), round(w))
        forks = width > 1.2
        turn = rng.uniform(.35, .8, forks.sum())
        start = np.tile(points[forks, -1] % side, (2, 1))
        angle = np.tile(angles[forks, -1], 2) + np.r_[turn, -.7 * turn]
        width = np.tile(width[forks] * .72, 2)
    return torch.from_numpy(np.asarray(canvas.resize((n, n), Image.BOX), np.float32) / 255)


def skin(rng, n):
    """The texture maps of one stretch of mucosa: (5, n + 2, n + 2), padded by one wrapped pixel
    for grid_sample."""
    maps = [vessels(rng, n), *(noise(rng, n, n / waves) for waves in (3, 9, 24, 80))]
    return F.pad(torch.stack(maps)[None], (1, 1, 1, 1), mode="circular")[0]


def anatomy(kind, rng):
    """The scene of one stretch of gut, in units of its radius. kind: a landmark, mayo-0 ..
    mayo-3, polyp or colon."""
    u, phase = rng.uniform, lambda: rng.uniform(0, 2 * math.pi)
    spread = lambda sd: rng.normal(0, sd, 2).tolist()  # noqa: E731
    s = SimpleNamespace(
        sway=u(.15, .5), sway_at=(phase(), phase()), oval=u(0, .15), oval_at=phase(),  # the tube
        end=None, corner=.3,
        fold=u(.12, .3), spacing=u(.9, 1.7), fold_at=phase(), teniae=phase(), tilt=spread(.2),
        rugae=0, spokes=None, hole=None, shaft=None, polyp=None, line=None,
        tone=(rng.normal(0, .2), rng.normal(0, .12)), mucus=u(-1, 1),  # the mucosa
        mottle=u(0, .45), vessels=u(.6, 1), red=u(0, .4),
        granular=u(0, .2), villi=0., petechiae=0., erosions=0., ulcers=0., blood=0.,
        start=u(0, 20), ahead=(1.2, 4.), aside=.7, speed=u(.015, .04))  # the camera
    if kind in LANDMARKS and kind != "ileum":  # these end within sight
        vars(s).update(end=u(1.6, 2.5), start=0., sway=u(0, .08), corner=u(.5, .9),
                       fold=u(0, .1), aside=.5, speed=u(.008, .02))
    if kind == "cecum":  # three folds meet at the blind end, beside the orifice of the appendix
        at, r = phase(), u(.15, .3)
        vars(s).update(fold=u(.1, .22), spacing=u(1.2, 1.8),
                       spokes=(3, u(.28, .45), u(.12, .2), phase()),
                       hole=(r * math.cos(at), r * math.sin(at), u(.10, .15), u(.05, .08), 0, 0.))
    elif kind == "ileum":  # velvety, without the colon's folds and vessels
        vars(s).update(fold=u(0, .06), spacing=u(.35, .7), villi=u(.7, 1.), vessels=u(0, .3))
    elif kind == "pylorus":  # a round dark hole in smooth, converging mucosa
        r = u(.14, .28)
        vars(s).update(fold=u(.02, .12), vessels=u(0, .3),
                       hole=(*spread(.06), r, r * u(.8, 1), 0, 0.),
                       spokes=(int(rng.integers(5, 9)), u(.06, .14), u(.12, .2), phase()))
    elif kind == "z-line":  # pale above an irregular line, salmon below it; a star closes the end
        vars(s).update(end=u(1.9, 2.7), vessels=u(.4, .8),
                       line=(-1, u(1.3, 2.4), u(.15, .4), phase(), u(.35, .6)),
                       spokes=(int(rng.integers(4, 7)), u(.1, .22), u(.14, .2), phase()),
                       hole=(*spread(.1), u(.14, .24), u(.14, .24), int(rng.integers(4, 6)),
                             u(.2, .4)))
    elif kind == "retroflex-rectum":  # the scope sees itself come in through the dentate line
        vars(s).update(shaft=(*spread(.12), phase(), u(.14, .24)),
                       line=(1, s.end + u(.3, .6), u(.1, .2), phase(), u(.2, .45)),
                       spokes=(int(rng.integers(6, 10)), u(.06, .14), u(.08, .12), phase()))
    elif kind == "retroflex-stomach":  # the scope sees itself among thick winding folds
        vars(s).update(shaft=(*spread(.12), phase(), u(.14, .24)), rugae=int(rng.integers(4, 7)),
                       vessels=u(0, .35))
    elif kind == "polyp":
        s.polyp = polyp_at(s, rng, s.start + u(.8, 1.6))
    elif kind.startswith("mayo"):  # vessels fade, then redness, granules, erosions; last ulcers, blood
        grade = int(kind[-1])
        pick = lambda *ranges: u(*ranges[grade])  # noqa: E731
        vars(s).update(fold=u(.05, .25), aside=1., red=.12 * (grade + u(-1.5, 1.5)),
                       vessels=pick((.8, 1.), (.2, .4), (0, .05), (0, .02)),
                       granular=pick((0, .15), (.2, .4), (.5, .9), (.5, 1.)),
                       petechiae=pick((0, 0), (0, 0), (.5, 1.), (.3, 1.)),
                       erosions=pick((0, 0), (0, 0), (.3, .8), (.3, .8)),
                       ulcers=pick((0, 0), (0, 0), (0, 0), (.5, 1.)),
                       blood=pick((0, 0), (0, 0), (0, 0), (.2, 1.)))
    return s


def polyp_at(s, rng, z):
    """A polyp on the wall of s at depth z, sessile or on a stalk: an ellipsoid with axes inward,
    around, along."""
    u = rng.uniform
    size, angle, stalked = u(.18, .5), u(0, 2 * math.pi), u() < .35
    height = u(.8, 1.1) if stalked else u(.5, 1.)
    axes = torch.tensor([size * height, size * u(.8, 1.2), size * u(.8, 1.3)])
    lift = float(axes[0]) * (u(1.1, 1.6) if stalked else u(.1, .5))
    inward = torch.tensor([-math.cos(angle), -math.sin(angle), 0.])
    around = torch.tensor([math.sin(angle), -math.cos(angle), 0.])
    frame = torch.stack([inward, around, torch.tensor([0., 0., 1.])])
    return SimpleNamespace(centre=middle(s, z) - (1 - lift) * inward, frame=frame, axes=axes,
                           stalk=size * .35 if stalked else 0., red=u(-.25, .5), pits=u(.2, 1))


def centreline(s, z):
    return s.sway * (z * .7 + s.sway_at[0]).cos(), s.sway * (z * .5 + s.sway_at[1]).cos()


def middle(s, z):
    """The point (3,) of the centreline at depth z."""
    return torch.stack([*centreline(s, torch.tensor(float(z))), torch.tensor(float(z))])


def camera(s, rng, t=0):
    """Position (3,) and rotation (3, 3; columns right, down, forward) at frame t of the path
    that rng draws."""
    u = rng.uniform
    offset, aside = rng.normal(0, .2, 2).clip(-.4, .4), rng.normal(0, s.aside, 2)
    ahead, roll = u(*s.ahead), u(0, 2 * math.pi)
    wobble = np.array([.06 * math.sin(u(.1, .4) * t + u(0, 6)) for _ in range(6)])
    z = s.start + u(-.3, .4) + s.speed * t
    position = middle(s, z).numpy() + [*(offset + wobble[:2]), 0]
    target = s.polyp.centre if s.polyp else middle(s, s.end or z + ahead)
    forward = target.numpy() + [*(aside * (.5 if s.polyp else 1) + wobble[2:4]), 0] - position
    forward /= np.linalg.norm(forward)
    right = np.cross((math.cos(roll + wobble[4]), math.sin(roll + wobble[4]), 0), forward)
    right /= np.linalg.norm(right)
    turn = np.stack([right, np.cross(forward, right), forward], 1)
    return torch.from_numpy(position).float(), torch.from_numpy(turn).float()


# -----------------------------------------------------------------------------------------------
# Geometry: distances inside the lumen, and the first hit of every ray

def length(v):
    return (v * v).sum(0).sqrt()  # several times faster than torch.norm over three rows


def smooth_min(a, b, k):
    h = (k - (a - b).abs()).clamp(min=0)
    return torch.minimum(a, b) - h * h / (4 * k)


def lumen(p, s):
    """Distance (H, W) from points p (3, H, W) in the lumen to its wall, and their polar
    coordinates (rho, theta)."""
    x, y, z = p
    cx, cy = centreline(s, z)
    x, y = x - cx, y - cy
    rho, theta = torch.hypot(x, y), torch.atan2(y, x)
    radius = 1 + s.oval * (2 * theta + s.oval_at).cos()
    if s.fold:  # haustra: sharp tilted crests, thicker between the three teniae
        along = z + s.tilt[0] * x + s.tilt[1] * y + .12 * (theta + 1.3 * z).cos()
        ring = 2 * math.pi / s.spacing * along + s.fold_at
        thick = 1 + .7 * (3 * theta + s.teniae + 1.9 * z).cos()
        radius = radius - s.fold * (3 * ring.cos() - 3).exp() * thick
    if s.rugae:
        wind = 1.6 * (2.1 * z + s.fold_at).cos(), .8 * (5.3 * z + s.teniae).cos()
        wave = (s.rugae * theta + wind[0] + wind[1]).cos()
        radius = radius - .2 * (wave * wave + .01).sqrt()
    d = radius - rho
    if s.end:
        d = smooth_min(d, s.end - z - relief(rho, theta, s), s.corner)
    if s.hole:
        hx, hy, rx, ry, points, star = s.hole
        hole = 1 + star * (points * theta).cos() - torch.hypot((x - hx) / rx, (y - hy) / ry)
        d = -smooth_min(-d, -min(rx, ry) * hole, .12)
    return d, rho, theta


def relief(rho, theta, s):
    """Height of the ridges that run to the centre of a closed end."""
    if not s.spokes:
        return 0.
    number, height, width, at = s.spokes
    # Squared, to the nearest ridge
    across = rho * rho * (2 / number ** 2) * (1 - (number * (theta - at)).cos())
    return height * (-across / width ** 2).exp() * (1.4 * rho).clamp(max=1)


def shaft(p, s):
    """Distance to the scope's own shaft: a rod from behind the closed end to a place beside the
    camera."""
    x, y, at, radius = s.shaft
    start = torch.tensor([x, y, s.end + .5]).view(3, 1, 1)
    rod = torch.tensor([1.1 * math.cos(at), 1.1 * math.sin(at), -.6]).view(3, 1, 1) - start
    along = (((p - start) * rod).sum(0) / (rod * rod).sum()).clamp(0, 1)
    return length(p - start - along * rod) - radius


def polyp(p, q):
    """Distance to polyp q and its stalk."""
    e = (q.frame @ (p - q.centre.view(3, 1, 1)).view(3, -1)).view(p.shape)
    axes = q.axes.view(3, 1, 1)
    k = length(e / axes)
    # To first order the distance to the ellipsoid
    d = k * (k - 1) / length(e / axes ** 2).clamp(min=1e-6)
    if q.stalk:
        d = torch.minimum(d, torch.maximum(torch.hypot(e[1], e[2]) - q.stalk, e[0]))
    return d


def nearest(p, s):
    d = lumen(p, s)[0]
    d = torch.minimum(d, shaft(p, s)) if s.shaft else d
    return torch.minimum(d, polyp(p, s.polyp)) if s.polyp else d


@lru_cache
def rays(size, scope):
    """Directions (3, size, size) of a lens with barrel distortion, what the frame shows (bool),
    and the vignette."""
    o = SCOPES[scope]
    c = (torch.arange(size) + .5) / size * 2 - 1
    y, x = torch.meshgrid(c, c, indexing="ij")
    r = torch.hypot(x, y)
    half, barrel = math.radians(o["fov"] / 2), o["barrel"]
    angle = (half * r * (1 + barrel * r * r) / (1 + barrel)).clamp(max=1.75)
    shown = (x.abs() + y.abs() < o["corner"]) & (r < o["round"])
    dirs = torch.stack([angle.sin() * x / r, angle.sin() * y / r, angle.cos()])
    return dirs, shown, 1 - o["vignette"] * r * r / 2


def march(s, origin, dirs, t, steps, longest):
    """Distances t along the rays after that many steps, and the last step. The first is 0.7 of
    the distance d to the wall; then the secant through the last two says how far to go (up to
    longest * d), since a ray that grazes the wall would creep."""
    d = nearest(origin + t * dirs, s)
    step = .7 * d
    for _ in range(steps - 1):
        t = t + step
        before, d = d, nearest(origin + t * dirs, s)
        step = d / ((before - d) / step).nan_to_num(1).clamp(1 / longest, 1.4)
    return t + step, step


def look_around(s, origin, turn, size, scope):
    """Trace all rays: directions (3, H, W), distance t (H, W), hits p (3, H, W), the lumen's
    (distance, rho, theta) there, masks (H, W) of polyp and shaft."""
    origin = origin.view(3, 1, 1)
    t = torch.full((size // 4, size // 4), .02)
    # A quarter of the resolution finds what is there
    for scale, steps, longest in ((4, 14, 1), (2, 4, 2.5), (1, 3, 2.5)):
        dirs, shown, _ = rays(size // scale, scope)
        dirs = (turn @ dirs.view(3, -1)).view(dirs.shape)
        t, step = march(s, origin, dirs, t, steps, longest)
        if scale > 1:
            # Start no further than any neighbour stands, lest a thin edge be jumped over
            t = -.97 * F.interpolate(F.max_pool2d(-t[None], 3, 1, 1)[None], scale_factor=2)[0, 0]
    late = step.abs() > .004 * t  # rays that pass close by an edge need many more, but are few
    t[late] = march(s, origin, dirs[:, late][..., None], t[late][:, None], 10, 2.5)[0][:, 0]
    t = t.clamp(.02, 12)
    p = origin + t * dirs
    wall, absent = lumen(p, s), torch.zeros_like(shown)
    on_polyp = shown & (polyp(p, s.polyp) < wall[0]) if s.polyp else absent
    on_shaft = shaft(p, s) < wall[0].clamp(min=.01) if s.shaft else absent
    return dirs, t, p, wall, on_polyp, on_shaft


def normals(p):
    """Unit normals (3, H, W) of a surface seen as positions p (3, H, W). Of the two neighbours
    on an axis the closer counts, so that a silhouette belongs to one surface only."""
    def slope(dim):
        d = p.diff(dim=dim)
        ahead = torch.cat([d, d.narrow(dim, -1, 1)], dim)
        behind = torch.cat([d.narrow(dim, 0, 1), d], dim)
        return torch.where((ahead * ahead).sum(0) < (behind * behind).sum(0), ahead, behind)
    (ax, ay, az), (bx, by, bz) = slope(1), slope(2)
    n = torch.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx])
    return n / length(n).clamp(min=1e-9)


# -----------------------------------------------------------------------------------------------
# Colour and light

def step(x, at, width):
    """0 below at, 1 above, a ramp of that width between."""
    return ((x - at) / width + .5).clamp(0, 1)


def mix(a, colour, share):
    return a + (torch.tensor(colour).view(3, 1, 1) - a) * share


def mucosa(s, look, maps, t, p, rho, theta, on_polyp):
    """Albedo (3, H, W), bumps (H, W; towards the camera, in radii), a random field (H, W) that
    breaks up the shine."""
    depth = p[2] + 1 - rho  # along the profile: down the wall, then to the centre of the end
    u, v = theta / math.pi, depth * .35
    if s.end:  # straight on at the closed end
        flat = (s.end - p[2] < .45) & (rho < .8)
        u, v = torch.where(flat, p[0] * .35, u), torch.where(flat, p[1] * .35, v)
    uv = torch.stack([u - u.floor(), v - v.floor()], -1) * 2 - 1
    tree, low, mid, small, fine = F.grid_sample(maps[None], uv[None], align_corners=False)[0]
    on_polyp, near = on_polyp.float(), (1.6 - .35 * t).clamp(0, 1)  # detail is lost with distance

    ulcer = step(low + .45 * mid + .2 * small, 2.35 - .8 * s.ulcers, .25) * bool(s.ulcers)
    erosion = step(small + .4 * low, 2.6 - .6 * s.erosions, .4) * bool(s.erosions)
    petechia = step(fine + .5 * low, 2.9 - .9 * s.petechiae, .6) * bool(s.petechiae)
    blood = step(mid - .8 * low + .2 * small, 3.1 - .9 * s.blood, .3) * bool(s.blood)
    mucus = .8 * step(mid + .6 * low + .2 * small, 2.4 - .65 * (look.mucus + s.mucus), .6)
    pale = torch.zeros_like(t)
    if s.line:
        side, at, tongue, phase, contrast = s.line
        waves = .5 * (3 * theta + phase).cos() + .4 * (7 * theta + 2 * phase).cos() + .5 * mid
        zigzag = tongue * waves
        pale = contrast * step(side * (depth - at - zigzag), 0, .05)

    blush = s.red * (.7 + .5 * low.clamp(-1, 1)) + s.mottle * small.clamp(min=0)
    blush = blush + .8 * petechia + .5 * erosion + 1.5 * blood
    bumps = .010 * s.granular * small + .012 * s.villi * (small + fine) + .002 * fine + .004 * mid
    bumps = bumps + .006 * s.vessels * tree - .02 * ulcer + .012 * mucus
    if s.polyp:
        blush = blush + on_polyp * s.polyp.red
        bumps = bumps + on_polyp * s.polyp.pits * (.006 * small + .005 * fine)
    vessel = tree * s.vessels * near * (1 - pale) * (1 - .6 * on_polyp)
    absorbed = vessel + .75 * blush - pale + .07 * low + .05 * mid + .06 * s.villi * fine
    base = torch.tensor(look.log_base) - torch.tensor([0., s.tone[0], s.tone[0] + s.tone[1]])
    base = torch.minimum(base, torch.tensor([0., -.5, -.55]))  # no mucosa is grey
    albedo = (base.view(3, 1, 1) * (1 + .15 * t.clamp(max=4))  # light that bounces again reddens
              - torch.tensor([.3, 1., .85]).view(3, 1, 1) * absorbed).exp()
    raw = torch.maximum(ulcer, .6 * (erosion - petechia).clamp(min=0))
    albedo = mix(albedo, (.9, .82, .6), raw)
    albedo = mix(albedo, (.85, .8 - .15 * look.bile, .7 - .5 * look.bile), .6 * mucus)
    return albedo, bumps * near, mid + small


def render(s, look, maps, origin, turn, rng, size=256, scope=1):
    """One frame, uint8 (size, size, 3), and the mask of the polyp's visible part, bool (size,
    size)."""
    o, (_, shown, vignette) = SCOPES[scope], rays(size, scope)
    dirs, t, p, (_, rho, theta), on_polyp, on_shaft = look_around(s, origin, turn, size, scope)
    albedo, bumps, sparkle = mucosa(s, look, maps, t, p, rho, theta, on_polyp)
    on_shaft = on_shaft.float()
    albedo = mix(albedo, (.055, .04, .035), on_shaft)
    facing = lobe = -(normals(p - bumps * (1 - on_shaft) * dirs) * dirs).sum(0).clamp(max=0)

    energy = (.75 * facing + .25) / (t * t + .05)
    energy = energy * 2. * look.exposure / (energy.clamp(max=4) * shown).mean()
    for _ in range(5):
        lobe = lobe * lobe  # to the 32nd power
    shine = lobe * look.gloss * step(sparkle, 1.9, .8) * (1 - .7 * on_shaft)
    gain = torch.tensor([a * b for a, b in zip(look.gain, o["gain"])]).view(3, 1, 1)
    image = (1 - (-(albedo + 2.5 * shine) * energy * gain).exp()) * vignette
    for _ in range(o["blur"]):
        # The mean of 2 x 2 pixels; avg_pool2d takes 3 times as long
        image = F.pad(image[None], (1, 0, 1, 0), mode="replicate")[0]
        image = image[:, 1:] + image[:, :-1]
        image = (image[..., 1:] + image[..., :-1]) / 4
    grain = torch.from_numpy(rng.standard_normal((3, size, size), dtype=np.float32))
    image = (image + o["noise"] * grain * (.4 + image)).clamp(0, 1) * shown
    return (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy(), on_polyp.numpy()


# -----------------------------------------------------------------------------------------------
# What spoils real video

# in the order in which light, then the signal meets them
ARTEFACTS = "water", "blur", "interlacing", "box", "layout", "text"


def recording(rng, size):
    """What all frames of a patient at one place share: the water before the lens and what the
    endoscope's processor writes beside the picture."""
    u = rng.uniform
    side = round(size * u(.24, .34))
    day, month, year, *time = rng.integers(10, (29, 13, 25, 18, 60, 60))
    small = round(size * u(.45, .9))  # side of the picture in the recorder's frame
    turns = rng.normal(0, .5, 24).cumsum()  # the course of the scope, on the position display
    course = np.stack([np.cos(turns), np.sin(turns)], 1).cumsum(0)
    course = (course - course.min(0)) / (np.ptp(course, 0).max() + 1e-6)
    return SimpleNamespace(
        ripples=noise(rng, size, size / 5), water=u(.4, 1), flow=u(.01, .03) * size,
        box=(round(size * u(0, .04)), size - side - round(size * u(0, .04)), side), course=course,
        words=f"{day}/{month}/20{year}\n{':'.join(map(str, time))}\nGr:N Cm:1",
        small=small, corner=(round((size - small) * u(.3, 1)), round((size - small) * u(0, 1))),
        black=round(u(0, 23)))  # of that frame: 16 in studio range


def spoil(image, mask, tape, rng, i, scope, artefacts):
    """Frame i of a recording with these artefacts: uint8 (size, size, 3) and the mask, bool
    (size, size), as copies. The mask stays that of the scene, less what the position display
    hides, and goes where the layout puts the picture."""
    size, shown = len(image), rays(len(image), scope)[1]
    x = torch.from_numpy(image).permute(2, 0, 1).float()                          # (3, H, W)
    motion = (rng.standard_t(2, 2) * .012).clip(-.08, .08) * size  # pixels a frame; jerks are rare
    if "water" in artefacts:
        x = under_water(x, tape.ripples.roll(round(i * tape.flow), 0), tape.water)
    if "blur" in artefacts:  # the mean over the time that the shutter is open
        n = 2 + int(np.abs(motion).max())
        x = torch.stack([moved(x, motion, k / n) for k in range(n)]).mean(0)
    if "interlacing" in artefacts:  # the odd lines are half a frame later than the even ones
        x[:, 1::2] = moved(x, motion, .5)[:, 1::2]
    page = Image.fromarray((x * shown).round().byte().permute(1, 2, 0).contiguous().numpy())
    draw, mask = ImageDraw.Draw(page), mask.copy()
    left, top, side = tape.box
    if "box" in artefacts:
        draw.rectangle((left, top, left + side, top + side), "black", (70, 70, 70))
        path = [(left + side * (.15 + .7 * a), top + side * (.15 + .7 * b)) for a, b in tape.course]
        draw.line(path, (90, 220, 120), max(size // 64, 1), joint="curve")
        mask[top : top + side + 1, left : left + side + 1] = False
    if "layout" in artefacts:  # the recorder's frame is larger than the picture, its black not 0
        page = laid_out(page, tape, (tape.black,) * 3)
        mask = np.array(laid_out(Image.fromarray(mask), tape, False))
    if "text" in artefacts:
        draw = ImageDraw.Draw(page)
        font = ImageFont.load_default(max(size // 20, 6))
        draw.text((size // 40, size // 40), tape.words, (225, 225, 225), font)
    return np.array(page), mask


def laid_out(picture, tape, colour):
    """The PIL image, smaller, where the recording has it in a frame of that colour."""
    frame = Image.new(picture.mode, picture.size, colour)
    how = Image.Resampling.NEAREST if picture.mode == "1" else Image.Resampling.BOX
    frame.paste(picture.resize((tape.small, tape.small), how), tape.corner)
    return frame


def moved(x, motion, share):
    """Images (3, H, W) moved by a share of the motion (right, down) in pixels; what leaves comes
    in at the other side, where most frames are black."""
    return x.roll((round(motion[1] * share), round(motion[0] * share)), (1, 2))


def under_water(x, ripples, depth):
    """Images (3, H, W) seen through water whose surface ripples (H, W): bent, paler, with a
    shine."""
    size = len(ripples)
    slope = torch.stack([ripples.roll(-1, 1) - ripples, ripples.roll(-1, 0) - ripples], -1)
    slope = slope / slope.std()                                                   # (H, W, 2)
    c = (torch.arange(size) + .5) / size * 2 - 1
    straight = torch.stack(torch.meshgrid(c, c, indexing="xy"), -1)               # (H, W, 2)
    bent = straight + .02 * depth * slope
    x = F.grid_sample(x[None], bent[None], padding_mode="reflection", align_corners=False)[0]
    shine = step(slope.sum(-1), 3.2, .8)  # where the surface throws the lamp back, a hundredth of it
    return mix(mix(x, (205., 200., 170.), .18 * depth), (255., 255., 255.), .8 * shine)


# -----------------------------------------------------------------------------------------------
# Writing the published layouts

def frames_of(job):
    """Yield (image, mask) of each frame of one patient at one place. A pure function of the
    job."""
    key = (job["seed"], job["scope"], job["patient"])
    look, rng = appearance(generator(*key)), generator(*key, job["kind"], job["place"])
    maps = skin(rng, job["size"] * 3 // 2)
    s, views = scene_views(job, rng)
    artefacts = job.get("artefacts")
    if artefacts:  # drawn by a generator of its own: what lies below them is the same as without
        spoiler = generator(*key, job["kind"], job["place"], "artefacts")
        tape = recording(spoiler, job["size"])
    for i, view in enumerate(views):
        image, mask = render(s, look, maps, *view, rng, job["size"], job["scope"])
        if artefacts:
            image, mask = spoil(image, mask, tape, spoiler, i, job["scope"], artefacts)
        yield image, mask


def scene_views(job, rng):
    """Anatomy and one (position, rotation) per frame: along a path for a video, else
    independent. Where masks are asked for, the polyp covers 2 to 30 % of every frame."""
    while True:
        s, views, path = anatomy(job["kind"], rng), [], int(rng.integers(2 ** 31))
        for i in range(len(job["images"])):
            for attempt in range(8):
                view = camera(s, generator(path), i) if job["video"] else camera(s, rng)
                share = look_around(s, *view, 64, job["scope"])[4].float().mean() if job["masks"] else .1
                if .02 < share < .30:
                    views.append(view)
                    break
        if len(views) == len(job["images"]):
            return s, views


def write_job(job):
    """Write the frames (and masks) of a job; returns how many."""
    for i, (image, mask) in enumerate(frames_of(job)):
        save(image, job["images"][i])
        if job["masks"]:
            save(mask.astype(np.uint8) * 255, job["masks"][i])
    return len(job["images"])


def save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, quality=92)


def labelled_jobs(root, scope, scale, rng):
    """The jobs of the three labelled trees under root, whose split lists it writes."""
    def number(n, least):
        return max(least, round(n * scale))
    each = min(4, number(12, 1))  # frames of a patient in one place
    jobs = hyper_kvasir(root / "hyper-kvasir", number(30, 5), each)
    jobs += kvasir_seg(root / "Kvasir-SEG", number(100, 8), each)
    # More patients of fewer frames: 15 % of them are all that is tested
    jobs += limuc(root / "LIMUC", number(96, 12), min(2, each), rng)
    return [dict(job, scope=scope, video=False) for job in jobs]


def hyper_kvasir(tree, patients, each):
    """A patient has the three landmarks of one tract, or all grades; every class stands in
    blocks, one per fold."""
    jobs, rows = [], []
    places = []  # (folder, kind, name in the csv, first patient, place, frames of each)
    for i, (name, (tract, official)) in enumerate(LANDMARKS.items()):
        folder = f"{tract}-gi-tract/anatomical-landmarks/{name}"
        places.append((folder, name, official, (tract == "upper") * patients, i, each))
    for grade, count in ((1, 2), (2, 4), (3, 1)):  # about the official shares
        name = f"ulcerative-colitis-grade-{grade}"
        folder = f"lower-gi-tract/pathological-findings/{name}"
        places.append((folder, f"mayo-{grade}", name, 2 * patients, grade, count))
    for folder, kind, official, first, place, count in places:
        for p in range(patients):
            files = [f"patient{first + p}_{4 * place + i}.jpg" for i in range(count)]
            rows += [f"{f};{official};{p * 5 // patients}" for f in files]
            images = [tree / "labeled-images" / folder / f for f in files]
            jobs.append(dict(kind=kind, patient=first + p, place=place, images=images, masks=None))
    rows = ["file-name;class-name;split-index", *rows]
    write_text(tree / "official_splits/5_fold_split.csv", "\n".join(rows) + "\n")
    return jobs


def kvasir_seg(tree, patients, each):
    """Polyps with masks; 88 % of the patients in train.txt, as 880 of the published 1,000
    frames."""
    stems = [[f"patient{p}_{i}" for i in range(each)] for p in range(patients)]
    cut = round(.88 * patients)
    write_text(tree / "train.txt", "\n".join(sum(stems[:cut], [])) + "\n")
    write_text(tree / "val.txt", "\n".join(sum(stems[cut:], [])) + "\n")
    return [dict(kind="polyp", patient=1000 + p, place=0,
                 images=[tree / f"images/{n}.jpg" for n in names],
                 masks=[tree / f"masks/{n}.jpg" for n in names]) for p, names in enumerate(stems)]


def limuc(tree, patients, each, rng):
    """Four places per patient, grades in LIMUC's shares; a test set and ten random train/val
    lists, all by patient."""
    ends = np.round(np.cumsum((0, *MAYO_SHARE)) * 4 * patients).astype(int)
    grades = rng.permutation(np.repeat(range(4), np.diff(ends))).reshape(patients, 4)
    everyone = np.arange(patients)
    test = complete_draw(everyone, grades, .15, rng)
    jobs, frames = [], {p: [] for p in everyone}  # patient -> (folder, name)
    for p in everyone:
        part = tree / ("test_set" if p in test else "train_and_validation_sets")
        for place, grade in enumerate(grades[p]):
            names = [f"UC_patient_{p + 1}_{each * place + i}.bmp" for i in range(each)]
            jobs.append(dict(kind=f"mayo-{grade}", patient=2000 + int(p), place=place, masks=None,
                             images=[part / f"Mayo {grade}" / name for name in names]))
            frames[p] += [(f"Mayo {grade}", name) for name in names]
    rest = np.setdiff1d(everyone, test)
    for fold in range(10):
        val = complete_draw(rest, grades, .10, rng)
        for name, chosen in (("train", np.setdiff1d(rest, val)), ("val", val)):
            listed = {f"Mayo {g}": [] for g in range(4)}
            for folder, frame in (pair for p in chosen for pair in frames[p]):
                listed[folder].append(frame)
            folder = tree / f"cross_validation_folds_train_val_info/fold_{fold}"
            write_text(folder / f"{name}.json", json.dumps(listed))
    return jobs


def complete_draw(patients, grades, share, rng):
    """A random share of the patients, drawn again until they have every grade (much as LIMUC's
    own script)."""
    while True:
        drawn = rng.permutation(patients)[:max(2, round(share * len(patients)))]
        if len(np.unique(grades[drawn])) == 4:
            return drawn


def video_jobs(root, videos, frames, rng):
    """The jobs of the unlabelled videos under root, whose manifest.csv it writes. A video is one
    patient."""
    kinds = [*LANDMARKS, *(f"mayo-{g}" for g in range(4)), "polyp", "colon"]
    jobs, rows = [], ["path,video"]
    for v in range(videos):
        names = [f"video{v:04d}/{i:05d}.jpg" for i in range(frames)]
        rows += [f"{n},video{v:04d}" for n in names]
        for place, at in enumerate(range(0, frames, 10)):
            jobs.append(dict(scope=1, video=True, kind=str(rng.choice(kinds)), patient=3000 + v,
                             place=place, images=[root / name for name in names[at:at + 10]], masks=None))
    write_text(root / "manifest.csv", "\n".join(rows) + "\n")
    return jobs


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make(root, videos, frames, scale, size, seed, workers, artefacts=()):
    """Write the whole set into the empty folder root."""
    jobs = video_jobs(root / "unlabelled", videos, frames, generator(seed, "videos"))
    jobs += labelled_jobs(root, 1, scale, generator(seed, "labelled"))
    jobs += labelled_jobs(root / "scope2", 2, scale / 4, generator(seed, "scope2"))
    jobs = [dict(job, seed=seed, size=size, artefacts=artefacts) for job in jobs]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one result whatever the number of cores (as DataLoader's workers)
    loader = torch.utils.data.DataLoader(jobs, batch_size=None, collate_fn=write_job,
                                         num_workers=workers)
    number = sum(len(job["images"]) for job in jobs)
    with tqdm(total=number, unit="frame", desc="synthetic frames") as bar:
        for written in loader:
            bar.update(written)
    torch.set_num_threads(threads)


def ensure(root="data/synthetic", videos=40, frames=20, scale=1.0, size=256, seed=0, workers=None,
           artefacts=()):
    """Path of the synthetic set under root, made first if it is not there.

    scale multiplies the number of labelled patients (a test asks for videos=2, frames=4,
    scale=.1, size=64); artefacts: names in ARTEFACTS, none by default. Any number of processes
    may call it at once: one makes the set in a sibling folder and renames it, the others wait
    for the lock. A process that dies leaves nothing under root; the next call starts afresh."""
    root = Path(root).resolve()
    root.parent.mkdir(parents=True, exist_ok=True)
    with open(root.with_name(f".{root.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it however the process ends
        if (root / "made_by.json").exists():
            return root
        if root.exists() and any(root.iterdir()):
            raise FileExistsError(f"{root} holds files that synthetic.py did not make: "
                                  "name another folder")
        print(f"Making synthetic endoscopy in {root} (once; no download)", flush=True)
        making = root.with_name(f".{root.name}.making")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        if workers is None:
            has_affinity = hasattr(os, "sched_getaffinity")
            workers = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
        make(making, videos, frames, scale, size, seed, workers, artefacts)
        write_text(making / "made_by.json",
                   json.dumps(flags(videos, frames, scale, size, seed, artefacts)))
        making.rename(root)
    return root


def flags(videos, frames, scale, size, seed, artefacts):
    """What made_by.json says of a set."""
    made_by = dict(videos=videos, frames=frames, scale=scale, size=size, seed=seed)
    return made_by | ({"artefacts": list(artefacts)} if artefacts else {})


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", nargs="?", default="data/synthetic", help="folder to make (default: %(default)s)")
    add("--videos", type=int, default=40, help="unlabelled videos (default: %(default)s)")
    add("--frames-per-video", type=int, default=20, help="frames of each (default: %(default)s)")
    add("--scale", type=float, default=1.0,
        help="multiplies the number of labelled patients (default: %(default)s)")
    add("--size", type=int, default=256, help="pixels of a side (default: %(default)s)")
    add("--seed", type=int, default=0, help="another seed, another set (default: %(default)s)")
    add("--artefacts", nargs="*", choices=ARTEFACTS, metavar="NAME",
        help=f"what spoils real video, in all frames: {', '.join(ARTEFACTS)}; all of them where none "
        "is named (default: none)")
    add("--sheet", help="also write a contact sheet of the set to this PNG")
    args = parser.parse_args(argv)
    positive = min(args.videos, args.frames_per_video, args.scale) > 0
    if args.size < 32 or args.size % 8 or not positive:
        parser.error("--size must be a multiple of 8 from 32 up, "
                     "--videos, --frames-per-video and --scale positive")
    wanted = ARTEFACTS if args.artefacts == [] else args.artefacts or ()
    artefacts = tuple(name for name in ARTEFACTS if name in wanted)  # in one order
    asked = args.videos, args.frames_per_video, args.scale, args.size, args.seed
    try:
        root = ensure(args.out, *asked, artefacts=artefacts)
        if json.loads((root / "made_by.json").read_text()) != flags(*asked, artefacts):
            raise ValueError(f"{root} holds a set made with other flags ({root / 'made_by.json'}): "
                             "name another folder")
        if args.sheet:
            import figures  # lazily: the frames need no pictures of themselves
            figures.synthetic_set(root, args.sheet)
            print(f"wrote {args.sheet}")
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    frames = [f for f in root.rglob("*.*") if f.suffix in (".jpg", ".bmp") and f.parent.name != "masks"]
    print(f"{root}: {len(frames):,} frames\n"
          f"next: python pretrain.py --arch vitt14 --recipe demo --data {root / 'unlabelled'}")


if __name__ == "__main__":
    main()
