"""Curation of what real video looks like: small pictures in large frames, text, the position display,
water, interlacing, blur by motion (synthetic.ARTEFACTS)."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter

import curate
import synthetic
from test_curate import run

SIZE = 192
KINDS = (*synthetic.LANDMARKS, "polyp")


def film(patient, artefacts, n=4):
    """(frames of one patient as PIL images, what its recorder does to all of them)."""
    job = dict(kind=KINDS[patient % 5], patient=patient, place=0, images=[None] * n, masks=None,
               scope=1, video=True, seed=7, size=SIZE)
    plain = [image for image, _ in synthetic.frames_of(job)]
    rng = synthetic.generator(patient, "recorder")
    tape, mask = synthetic.recording(rng, SIZE), np.zeros((SIZE, SIZE), bool)
    spoilt = [synthetic.spoil(image, mask, tape, rng, i, 1, artefacts)[0]
              for i, image in enumerate(plain)]
    return [Image.fromarray(image) for image in spoilt], tape


def save(images, folder, quality=90):
    """Paths of the images as files in a new folder."""
    folder.mkdir(parents=True)
    images = list(images)
    paths = [folder / f"{i:02d}.jpg" for i in range(len(images))]
    for image, path in zip(images, paths):
        image.save(path, quality=quality)
    return paths


def field(paths):
    return curate.lit_box(torch.stack([curate.thumbnail(path) for path in paths]))


def inside(paths, boxes=None):
    """(n, 3, 128, 128): what is seen of each, by default inside the field of view found from it
    alone."""
    boxes = boxes or [field([path]) for path in paths]
    return torch.stack([curate.thumbnail(path, box) for path, box in zip(paths, boxes)])


def cosines(*sets):
    """Between the rows of the first set of descriptors and of each other, standardised together."""
    every = torch.cat(sets)
    first, *others = [F.normalize((x - every.mean(0)) / every.std(0), dim=1) for x in sets]
    return [first @ other.T for other in others]


@pytest.mark.parametrize("patient", range(6))
def test_the_field_of_view_is_found_in_a_film(patient, tmp_path):
    """Beside text, on a border of up to 22 of 255, and with the position display on it."""
    images, tape = film(patient, ("box", "layout", "text"))
    shown = synthetic.rays(SIZE, 1)[1].numpy()
    across, down = (np.flatnonzero(shown.any(axis)) for axis in (0, 1))
    edges = np.array([across[0], down[0], across[-1] + 1, down[-1] + 1])
    true = np.array(tape.corner * 2) + edges * tape.small / SIZE
    assert np.abs(field(save(images, tmp_path / "film")) - true * curate.SIDE / SIZE).max() <= 5


def test_a_frame_without_a_border_is_all_field():
    noise = torch.randint(60, 255, (2, 3, 128, 128), dtype=torch.uint8)
    assert tuple(curate.lit_box(noise)) == tuple(curate.lit_box(noise * 0)) == curate.WHOLE


def test_no_score_changes_and_no_frame_is_lost_by_its_layout(tmp_path):
    """A picture that is a fifth of its frame was too dark, whatever it showed."""
    for patient in range(4):
        plain = save(film(patient, ())[0], tmp_path / f"plain{patient}")
        framed = save(film(patient, ("layout", "text"))[0], tmp_path / "in" / f"p{patient}")
        a, b = (curate.quality(inside(paths, [field(paths)] * 4)) for paths in (plain, framed))
        apart = (a - b).abs().amax(0)
        assert apart[:5].max() < 0.04 and apart[5] < 0.1  # "sharp": a small picture has less to show
    report, _ = run(tmp_path / "in", tmp_path / "out")
    assert not any(report["dropped"][reason] for reason in (*curate.QUALITY, "blur"))


def test_water_interlacing_and_the_position_display_cost_no_frame(tmp_path):
    for patient in range(5):
        artefacts = ("water", "interlacing", "box", "layout", "text")
        save(film(patient, artefacts)[0], tmp_path / "in" / f"p{patient}")
    report, _ = run(tmp_path / "in", tmp_path / "out")
    assert not any(report["dropped"][reason] for reason in (*curate.QUALITY, "blur"))


def test_frames_are_alike_by_what_they_show_not_by_their_layout(tmp_path):
    """Ten scenes, each in three layouts: the frame most like another is the same scene in another
    layout. Seen whole it was as a rule another scene in a like one."""
    plain, small = ([film(p, how, 1)[0][0] for p in range(10)] for how in ((), ("layout", "text")))
    wide = [Image.new("RGB", (300, SIZE), (16, 16, 16)) for _ in plain]
    for page, image in zip(wide, plain):
        page.paste(image.resize((130, 120), Image.BOX), (150, 40))
    paths = [save(images, tmp_path / name) for name, images in
             dict(plain=plain, small=small, wide=wide).items()]
    found, whole = (cosines(*(curate.descriptor(inside(p, boxes)) for p in paths))
                    for boxes in (None, [curate.WHOLE] * 10))
    right = [[int((c.argmax(1) == torch.arange(10)).sum()) for c in way] for way in (found, whole)]
    assert min(right[0]) >= 9 and max(right[1]) <= 4, right


def trembling(patient, n=4):
    """One view from a hand that trembles by half a percent, the light by some."""
    (image,), tape = film(patient, (), 1)
    rng = np.random.default_rng(patient)
    for _ in range(n):
        right, down = rng.normal(0, SIZE / 200, 2)
        moved = image.transform(image.size, Image.AFFINE, (1, 0, right, 0, 1, down), Image.BILINEAR)
        yield synthetic.laid_out(ImageEnhance.Brightness(moved).enhance(rng.uniform(.95, 1.05)), tape,
                                 (16, 16, 16))


def test_frames_of_one_view_are_near_duplicates(tmp_path):
    """A cosine of 0.95, as between two copies of a file, is not reached by many such pairs."""
    for patient in range(10):
        save(trembling(patient), tmp_path / "in" / f"p{patient}", 80)
    found = [run(tmp_path / "in", tmp_path / "out", *flags)[0]["dropped"]["near-duplicate"]
             for flags in ((), ("--duplicate", .95))]
    assert 25 <= found[0] <= 30 and found[1] < 22, found


def swept(image, pixels):
    """The image while the camera moves by that many pixels."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    x = torch.stack([synthetic.moved(x, (pixels, pixels), k / 16) for k in range(17)]).mean(0)
    return Image.fromarray(x.round().byte().permute(1, 2, 0).numpy())


def test_blur_is_what_is_less_sharp_than_its_video(tmp_path):
    """A patient with smooth mucosa is not blurred, and frames swept over a rough one are, though
    they are sharper than that."""
    rough = film(2, ("text",), 6)[0]
    rough[2:4] = [swept(image, 24) for image in rough[2:4]]
    smooth = [image.filter(ImageFilter.GaussianBlur(1.9)) for image in film(0, (), 6)[0]]
    for name, images in dict(rough=rough, smooth=smooth).items():
        save(images, tmp_path / "in" / name)
    report, rows = run(tmp_path / "in", tmp_path / "out", "--target", 12, "--duplicate", 2)
    assert [row["path"][-6:-4] for row in rows if row["video"] == "rough"] == ["00", "01", "04", "05"]
    assert report["dropped"]["blur"] == 2 and report["dropped"]["sharp"] == 0


def test_excluded_are_copies_that_were_kept_whole_framed_anew_or_cropped(tmp_path):
    """A benchmark shows the picture as its makers cut it. Frames compared whole miss every one that
    is framed anew or cropped, and other patients' frames stay, whatever the layout."""
    films = [film(patient, ("layout",), 3) for patient in range(10)]
    for p, (images, _) in enumerate(films):
        save(images, tmp_path / "in" / f"p{p}")
    cut = dict(whole=[], framed=[], cropped=[])
    for images, tape in films[:6]:
        (left, top), side = tape.corner, tape.small
        picture = images[1].crop((left, top, left + side, top + side))
        page = Image.new("RGB", (360, 288), (18, 18, 18))
        page.paste(picture.resize((250, 240)), (90, 30))
        for kind, image in zip(cut, (images[1].resize((150, 150)), page, picture.resize((200, 180)))):
            cut[kind].append(image)
    found = {}
    for kind, images in cut.items():
        save(images, tmp_path / kind, 85)
        _, rows = run(tmp_path / "in", tmp_path / "out", "--target", 30, "--duplicate", 2,
                      "--exclude", tmp_path / kind)
        left = {row["video"] + "/" + row["path"][-6:-4] for row in rows}
        found[kind] = sum(f"p{p}/01" not in left for p in range(6))
        assert all(f"p{p}/{i:02d}" in left for p in range(6, 10) for i in range(3))
    assert found["whole"] == 6 and found["framed"] >= 5 and found["cropped"] >= 4, found


def test_an_excluded_list_that_is_not_there_is_said_before_any_work(tmp_path, monkeypatch):
    save(film(0, (), 1)[0], tmp_path / "in" / "a")
    monkeypatch.setattr(curate, "quality", lambda *args: pytest.fail("worked before"))
    with pytest.raises(SystemExit, match="nowhere"):
        run(tmp_path / "in", tmp_path / "out", "--exclude", tmp_path / "nowhere")
