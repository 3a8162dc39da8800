"""The probes' heads on frames or a video of your own, all of them on one backbone. No medical device.

    python predict.py A.pt --heads A.mes.ordinal.pt A.polyps.linear.pt --data FRAMES --out OUT
    python predict.py A.pt --heads A.polyps.linear.pt --video FILE.mp4 --save-video OUT.mp4 --out OUT
    python predict.py A.pt --heads A.polyps.linear.pt --video /dev/video0 --out OUT    # live

The probes write their heads beside the checkpoint, as <checkpoint>.<task>.<head>.pt. Heads of one
view (how a frame becomes a square) and one size share a pass of the backbone. OUT gets
predictions.csv (a row per frame: labels, probabilities, area and box of the polyp), overlays/,
timeline pictures, summary.json, and run.json, which says what made them. The same command goes on
where it was stopped; Ctrl-C stops it.
"""
import argparse
import collections
import contextlib
import csv
import dataclasses
import itertools
import json
import os
import pathlib
import queue
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import figures
import frozen
import heads
import vit

NOTE = "research only: not a medical device"


# ---------------------------------------------------------------------------------------------
# Frames of a folder, a video file or a camera: (name, video, seconds, PIL image or None, error)


def folder_frames(frames, start):
    """The frames of a data.Frames from number `start` on. A folder knows no seconds: None."""
    for i in range(start, len(frames)):
        try:
            yield frames.name(i), frames.video(i), None, data.read_image(frames.path(i)), ""
        except data.BadImage as error:
            yield frames.name(i), frames.video(i), None, None, str(error)


def video_frames(source, fps, start=0, live=False):
    """Frames of a file, a camera or a stream through a pipe from ffmpeg, from number `start` on; a
    live source cannot go back, so there they are only counted from it.

    They come as PPM, in which each says its own size, and one at a time, so an hour needs no more
    memory than a second. SystemExit with ffmpeg's last words where it fails."""
    wanted = f"fps={fps:g}"
    if start and not live:
        wanted += f",trim=start_frame={start},setpts=PTS-STARTPTS"
    with tempfile.TemporaryFile() as errors:  # no pipe: a full one would stop ffmpeg
        process = ffmpeg("-i", source, "-vf", wanted, "-f", "image2pipe", "-c:v", "ppm", "-",
                         stdout=subprocess.PIPE, stderr=errors)
        try:
            name, n = os.path.basename(source), start
            while (image := read_ppm(process.stdout)) is not None:
                yield f"{name}:{n:06d}", name, n / fps, image, ""
                n += 1
            if process.wait() or n == start == 0:
                raise SystemExit(f"--video {source}: ffmpeg failed after {n} frames: {last_words(errors)}")
        finally:  # also when nobody wants another frame
            process.kill()
            process.wait()
            process.stdout.close()


def ffmpeg(*words, stdin=subprocess.DEVNULL, **pipes):
    """Start ffmpeg, quiet, without a keyboard, and in a session of its own: the terminal sends
    Ctrl-C to everyone in ours, and what was read and drawn so far is to be kept."""
    if shutil.which("ffmpeg") is None:
        raise SystemExit("ffmpeg is not installed: --video and --save-video need it on the PATH")
    return subprocess.Popen(["ffmpeg", "-nostdin", "-v", "error", *words], stdin=stdin,
                            start_new_session=True, **pipes)


def last_words(errors):
    """The last line that ffmpeg wrote to its file of errors."""
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing; is there a picture in it?"


def read_ppm(stream):
    """The next binary PPM of a stream as a PIL image; None at its end, also where it is cut short."""
    if stream.readline().strip() != b"P6":
        return None
    width, height = map(int, stream.readline().split())
    stream.readline()  # the largest value: 255
    pixels = stream.read(3 * width * height)
    if len(pixels) < 3 * width * height:
        return None
    return Image.frombytes("RGB", (width, height), pixels)


class Ahead:
    """Reads an iterator on a thread, some items ahead, so that decoding and computing overlap. With
    newest=True, for live input, an item that nobody has taken gives way to the next one and is
    counted in `dropped`: what is shown may skip, but never lags."""

    def __init__(self, items, room=16, newest=False):
        self.queue = queue.Queue(1 if newest else room)
        self.newest, self.dropped = newest, 0
        self.ended, self.seconds = threading.Event(), []  # seconds: what each item took to read
        threading.Thread(target=self.read, args=(items,), daemon=True).start()

    def read(self, items):
        last = None  # the end, or what went wrong: that is raised where the items are taken
        try:
            began = time.perf_counter()
            for item in items:
                self.seconds.append(time.perf_counter() - began)
                self.put(item, self.newest)
                if self.ended.is_set():
                    break
                began = time.perf_counter()
        except BaseException as error:  # SystemExit too
            last = error
        items.close()
        self.put(last, False)

    def put(self, item, newest):
        """Wait for room; with `newest` make it."""
        while not self.ended.is_set():
            try:
                return self.queue.put(item, timeout=0 if newest else 0.1)
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    if newest:
                        self.queue.get_nowait()
                        self.dropped += 1

    def __iter__(self):
        try:
            while (item := self.queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.ended.set()


def in_batches(items, size):
    """Lists of `size` items, the last one shorter (itertools.batched, which Python 3.11 lacks)."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


# ---------------------------------------------------------------------------------------------
# Passes: what the backbone computes, and for which heads


@dataclasses.dataclass(frozen=True)
class Pass:
    """One run of the backbone: how frames become squares, and the heads that it serves."""
    view: str
    size: int
    mirror: bool
    keys: tuple


def plan(loaded, scales, patch=14):
    """As few passes as the heads {key: frozen.Head} need. A boosted head is read at its own size
    alone, or at each of `scales` times that size and mirrored as well, as its probe tests it."""
    wanted = collections.defaultdict(list)
    for key, head in loaded.items():
        ways = [(1, False)]
        if head.name == "boosted" and scales:
            ways = itertools.product(scales, (False, True))
        for scale, mirror in ways:
            if (patches := round(head.size * scale / patch)) < 1:
                raise ValueError(f"--scales {scale:g}: nothing is left of {head.size} pixels")
            wanted[head.view, patches * patch, mirror].append(key)
    return [Pass(*how, tuple(keys)) for how, keys in wanted.items()]


@torch.no_grad()
def predict(model, loaded, passes, images, dtype, watch):
    """What every head says of PIL images: for each image {key: probabilities}, (C,) of a classifier
    or (H, W) of a polyp head. The Stopwatch `watch` gets the seconds of each stage."""
    found = [collections.defaultdict(list) for _ in images]
    for one in passes:
        with watch("squares"):
            x = torch.stack([data.square(image, one.size, one.view) for image in images])
            x = (x.flip(-1) if one.mirror else x).to(model.pos_embed.device)         # (B, 3, S, S)
        with watch("backbone"):
            tokens_of = frozen.shared_tokens(model, [loaded[key] for key in one.keys], x, dtype)
        for key in one.keys:
            with watch(key):
                answer = loaded[key](tokens_of(loaded[key]))
                for i, image in enumerate(images):
                    if loaded[key].task == "polyps":
                        p = heads.resize(answer[i], image.size[::-1]).sigmoid()      # (H, W)
                        found[i][key].append((p.flip(-1) if one.mirror else p).cpu())
                    else:
                        found[i][key].append(answer[0][i])                           # (C,)
    return [{key: torch.stack(p).mean(0).numpy() for key, p in said.items()} for said in found]


class Stopwatch:
    """`with watch("backbone"):` adds up a stage's seconds until `lap` puts them down for n frames."""

    def __init__(self, device):
        self.device, self.running, self.laps = torch.device(device), collections.Counter(), []

    @contextlib.contextmanager
    def __call__(self, stage):
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.running[stage] += time.perf_counter() - began

    def lap(self, n):
        self.laps += [(n, dict(self.running))] * n
        self.running.clear()

    def table(self):
        """Rows (stage, median, 95th and 99th percentile in ms per frame); last the latency, which
        is the whole batch's: a frame is ready when its batch is."""
        stages = dict.fromkeys(stage for _, lap in self.laps for stage in lap)
        rows = {stage: [lap.get(stage, 0) / n for n, lap in self.laps] for stage in stages}
        rows["latency"] = [sum(lap.values()) for _, lap in self.laps]
        return [(stage, *percentiles(seconds)) for stage, seconds in rows.items()]


def percentiles(seconds):
    """Median, 95th and 99th percentile, in ms."""
    return (1e3 * np.percentile(seconds, (50, 95, 99))).tolist() if seconds else [0.0] * 3


# ---------------------------------------------------------------------------------------------
# What is written: predictions.csv, a row per frame, and what is drawn from it


def columns_of(loaded, window):
    """The names of a row's columns; those of smoothed labels say so."""
    smooth = f" (running mean of {window} frames)" if window > 1 else ""
    columns = ["path", "video", "seconds", "error"]
    for key, head in loaded.items():
        if head.task == "polyps":
            columns += [f"{key} area", f"{key} box"]
        else:
            columns += [f"{key} label{smooth}"] + [f"{key} p({c})" for c in head.classes]
    return columns


def label_of(head, p):
    """The class that probabilities (C,) mean: an ordinal head's median grade, else the likeliest."""
    place = np.searchsorted(p.cumsum(), 0.5) if head.name == "ordinal" else p.argmax()
    return head.classes[min(int(place), len(p) - 1)]


class Smoothed:
    """The label of the mean of the last `window` frames' probabilities, within one video. It is
    computed from the probabilities as the table states them, so that a run that goes on from the
    table writes what an unbroken one writes."""

    def __init__(self, head, key, window):
        self.head, self.video, self.last = head, None, collections.deque(maxlen=window)
        self.columns = [f"{key} p({c})" for c in head.classes]

    def __call__(self, row):
        if row["video"] != self.video:
            self.last.clear()
            self.video = row["video"]
        if row["error"]:
            return ""
        self.last.append(np.array([row[column] for column in self.columns], float))
        return label_of(self.head, np.mean(self.last, 0))


def box_of(mask):
    """The words "left top right bottom" around the True pixels of (H, W), the last two exclusive;
    none where there is no such pixel."""
    if not mask.any():
        return ""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return f"{columns[0]} {rows[0]} {columns[-1] + 1} {rows[-1] + 1}"


class Table:
    """predictions.csv. Opened again it goes on after its last whole row, if it was made by the same
    heads from the same frames (run.json tells); `done` is the number of rows that are there."""

    def __init__(self, out, about, columns):
        self.path, self.columns = out / "predictions.csv", columns
        out.mkdir(parents=True, exist_ok=True)
        said = out / "run.json"
        old = json.loads(said.read_text()) if said.exists() else about
        if differ := ", ".join(k for k in about if about[k] != old.get(k)):
            raise SystemExit(f"--out {out} holds predictions made with another {differ}: "
                             "name another folder, or remove it")
        with vit.replacing(said) as temporary:
            temporary.write_text(json.dumps(about, indent=1) + "\n")
        self.keep_whole_rows()
        self.done = sum(1 for _ in self.rows())
        self.file = open(self.path, "a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, columns)
        if self.path.stat().st_size == 0:
            self.writer.writeheader()

    def keep_whole_rows(self):
        """A kill may have torn the last row: it goes."""
        if self.path.exists():
            content = self.path.read_bytes()
            with open(self.path, "r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)

    def rows(self):
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                yield from csv.DictReader(file)

    def write(self, row):
        self.writer.writerow(row)
        self.file.flush()


def row_of(frame, said, loaded):
    """A row of the table, but its labels; said {key: probabilities}, None of a damaged frame."""
    path, video, seconds, _, error = frame
    row = {"path": path, "video": video, "error": error,
           "seconds": "" if seconds is None else f"{seconds:.3f}"}
    for key, head in loaded.items() if said else ():
        if head.task == "polyps":
            mask = said[key] > 0.5
            row |= {f"{key} area": f"{mask.mean():.4f}", f"{key} box": box_of(mask)}
        else:
            row |= {f"{key} p({c})": f"{p:.6f}" for c, p in zip(head.classes, said[key])}
    return row


def drawn(frame, said, row, loaded, labels):
    """The frame with everything that was said of it."""
    lines, mask = [], None
    for key, head in loaded.items():
        if head.task == "polyps":
            mask = said[key] > 0.5 if mask is None else mask | (said[key] > 0.5)
            lines.append(f"{key}: {float(row[f'{key} area']):.1%} of the frame")
        else:
            label = row[labels[key]]  # by median or running mean, so not always the likeliest now
            lines.append(f"{key}: {label} ({said[key][head.classes.index(label)]:.0%})")
    return figures.overlay(frame[3], mask, lines, NOTE)


def slug(words):
    """What may stand in a file's name on any system."""
    return re.sub("[^A-Za-z0-9]+", "-", words).strip("-")


def draw_timelines(table, loaded, labels, out):
    """timeline_<video>.png of every video of two or more frames; returns their paths."""
    paths, rows_of = [], collections.defaultdict(list)
    for row in table.rows():  # a manifest may name its videos' frames in any order
        rows_of[row["video"]].append(row)
    for video, rows in rows_of.items():
        tracks = []
        if len(rows) < 2:
            continue
        for key, head in loaded.items():
            if head.task == "polyps":
                areas = [row[f"{key} area"] for row in rows]
                areas = [float(area) if area else None for area in areas]
                tracks.append((f"{key}: share of the frame", areas, None))
            else:
                number = {name: i for i, name in enumerate(head.classes)}
                tracks.append((key, [number.get(row[labels[key]]) for row in rows], head.classes))
        timed = all(row["seconds"] for row in rows)
        times = [float(row["seconds"]) for row in rows] if timed else range(len(rows))
        name, n = slug(video) or "frames", 1
        path = out / f"timeline_{name}.png"
        while path in paths:  # "a b" and "a-b" are two videos
            n += 1
            path = out / f"timeline_{name}-{n}.png"
        figures.timeline(path, f"{video or 'frames'}: {NOTE}", times, tracks, seconds=timed)
        paths.append(path)
    return paths


class Film:
    """The overlays as a video, through a pipe to ffmpeg; the file has its name once it is whole."""

    def __init__(self, path, fps, start):
        self.path = pathlib.Path(path)
        self.part = self.path.with_name(f".{self.path.stem}.part{self.path.suffix}")
        self.errors = tempfile.TemporaryFile()
        if start:
            print(f"--save-video {path} begins at frame {start}: what was drawn before is lost, "
                  "since a video that was stopped cannot be continued")
        self.process = ffmpeg(
            "-y", "-f", "image2pipe", "-c:v", "ppm", "-framerate", f"{fps:g}", "-i", "-",
            "-vf", "crop=trunc(iw/2)*2:trunc(ih/2)*2", "-pix_fmt", "yuv420p", str(self.part),
            stdin=subprocess.PIPE, stderr=self.errors)

    def add(self, picture):
        try:
            picture.save(self.process.stdin, "PPM")
        except BrokenPipeError:  # it has ended early
            self.close()

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        if self.process.wait():
            raise SystemExit(f"--save-video {self.path}: ffmpeg failed: {last_words(self.errors)}")
        os.replace(self.part, self.path)


# ---------------------------------------------------------------------------------------------
# The command


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, epilog=NOTE,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("checkpoint", help="the backbone that the heads were fitted on")
    flag("--heads", nargs="+", required=True, metavar="FILE",
         help="<checkpoint>.<task>.<head>.pt, as the probes write them")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="FRAMES",
                        help="folder of frames (a sub-folder counts as a video) or manifest.csv")
    source.add_argument("--video", metavar="FILE",
                        help="video file; or a camera or stream that ffmpeg reads, which is then "
                        "live: the newest frame is taken, those dropped are counted")
    flag("--out", required=True, metavar="OUT",
         help="folder to write; the same command goes on in it where it was stopped")
    flag("--fps", type=float, default=25.0,
         help="frames to look at in a second of --video (default: %(default)g)")
    flag("--save-video", metavar="OUT.mp4", help="the overlays as a video")
    flag("--overlays", default="20", metavar="none|N|all",
         help="annotated frames to keep, at even distances: of a video that is N an hour "
         "(default: %(default)s)")
    flag("--scales", type=float, nargs="+",
         help="read a boosted polyp head at these multiples of its size and mirrored as well, as "
         "its probe does: better, several times slower (default: its own size alone)")
    flag("--smooth", type=int, default=1, metavar="N",
         help="label by the mean probabilities of the last N frames; the table's header says so "
         "(default: %(default)s, off)")
    flag("--batch", type=int, help="frames per pass of the backbone (default: 8; live 1)")
    flag("--precision", default="auto", choices=("auto", *vit.PRECISIONS),
         help="type of the products (default: auto, what the hardware has)")
    flag("--device", default="auto", help="cpu, cuda or mps (default: a GPU if there is one)")
    return complete(parser, parser.parse_args(argv))


def complete(parser, args):
    """Fill in what depends on the source and the machine, and refuse what cannot be."""
    args.live = args.video is not None and not os.path.isfile(args.video)
    args.batch = args.batch if args.batch is not None else 1 if args.live else 8
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.overlays not in ("none", "all") and not args.overlays.isdigit():
        parser.error(f"--overlays {args.overlays}: none, all or a number")
    if args.fps <= 0 or min(args.smooth, args.batch) < 1 or min(args.scales or [1]) <= 0:
        parser.error("--fps and --scales must be positive, --smooth and --batch at least 1")
    if args.save_video and not args.video:
        parser.error("--save-video needs --video")
    if args.save_video and not pathlib.Path(args.save_video).absolute().parent.is_dir():
        parser.error(f"--save-video {args.save_video}: there is no such folder")
    return args


def open_heads(paths, model):
    """{key: frozen.Head}: a head is called by its task and name; of two the same, by its file."""
    loaded = {}
    for path in paths:
        head = frozen.load_head(path, model)
        key = f"{head.task} {head.name}"
        loaded[key if key not in loaded else pathlib.Path(path).stem] = head
    return loaded


def overlay_step(wanted, frames, fps):
    """Keep one overlay in so many frames; None: none."""
    if wanted in ("none", "all", "0"):
        return 1 if wanted == "all" else None
    return max(int((frames or 3600 * fps) // int(wanted)), 1)


def main(argv=None):
    args = parse(argv)
    with frozen.one_sentence():
        model = vit.load_backbone(args.checkpoint, args.device).requires_grad_(False)
        loaded = open_heads(args.heads, model)
        frames = data.Frames(args.data) if args.data else None
        passes = plan(loaded, args.scales, model.patch_size)
    dtype = vit.precision(args.device, args.precision)
    print(f"{len(loaded)} heads on {len(passes)} passes of the backbone in {dtype}:")
    for one in passes:
        print(f"  {one.size} px {one.view}{' mirrored' * one.mirror}: {', '.join(one.keys)}")
    about = {"checkpoint": frozen.digest(model),
             "heads": {key: frozen.digest(head.network) for key, head in loaded.items()},
             "source": os.path.abspath(args.data) if args.data else args.video,
             "frames per second": args.video and args.fps, "smoothing": args.smooth,
             "scales": args.scales, "precision": str(dtype), "note": NOTE}
    table = Table(pathlib.Path(args.out), about, columns_of(loaded, args.smooth))
    return run(args, model, loaded, passes, dtype, frames, table)


def run(args, model, loaded, passes, dtype, frames, table):
    """Every frame from where the table ends: predict, draw, write; then timelines and summary."""
    out, n, total = table.path.parent, table.done, frames and len(frames)
    if n:
        print(f"going on after {n} frames in {table.path}")
    if frames:
        source = folder_frames(frames, n)
    else:
        source = video_frames(args.video, args.fps, n, args.live)
    film = Film(args.save_video, args.fps, n) if args.save_video else None
    labels = {key: column for column in table.columns for key in loaded
              if column.startswith(f"{key} label")}
    smooth = {key: Smoothed(loaded[key], key, args.smooth) for key in labels}
    for row in table.rows():
        for remember in smooth.values():  # what an unbroken run would know here
            remember(row)
    watch, step = Stopwatch(args.device), overlay_step(args.overlays, total, args.fps)
    ahead, began = Ahead(source, newest=args.live), time.perf_counter()
    bar = tqdm(total=total, initial=n, unit="frame", desc="predict", disable=None)
    with bar, stop_politely() as stopped:
        for batch in in_batches(ahead, args.batch):
            good = [frame[3] for frame in batch if frame[3] is not None]
            answers = iter(predict(model, loaded, passes, good, dtype, watch) if good else ())
            for frame in batch:
                said = next(answers) if frame[3] is not None else None
                row = row_of(frame, said, loaded)
                row |= {labels[key]: smooth[key](row) for key in labels}
                if said and (film or step and n % step == 0):
                    with watch("overlay"):
                        picture = drawn(frame, said, row, loaded, labels)
                    if film:
                        film.add(picture)
                    if step and n % step == 0:
                        keep(picture, out / "overlays", f"{n:07d}_{slug(frame[0])[-80:]}.jpg")
                table.write(row)
                n += 1
            watch.lap(len(batch))
            bar.update(len(batch))
            if stopped:
                break
    seconds = time.perf_counter() - began
    table.file.close()
    if film:
        film.close()
    pictures = draw_timelines(table, loaded, labels, out)
    about = summary(args, table, loaded, labels, watch, ahead, n - table.done, seconds)
    tell(about)
    print(closing_words(args, out, len(pictures), frames, stopped))
    return about


def keep(picture, folder, name):
    folder.mkdir(exist_ok=True)
    picture.save(folder / name, quality=92)


@contextlib.contextmanager
def stop_politely():
    """A list that a first Ctrl-C fills: the batch at hand is still written. A second ends at once."""
    asked = []

    def handler(number, frame):
        asked.append(number)
        signal.signal(signal.SIGINT, before)
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def summary(args, table, loaded, labels, watch, ahead, n, seconds):
    """What was found in all rows, and how long the n new ones took; also as summary.json."""
    counts, frames, damaged = {key: collections.Counter() for key in loaded}, 0, 0
    for row in table.rows():
        frames, damaged = frames + 1, damaged + bool(row["error"])
        for key in loaded if not row["error"] else ():
            said = row[labels[key]] if key in labels else "polyp" if row[f"{key} box"] else "none"
            counts[key][said] += 1
    stages = {"decode": percentiles(ahead.seconds)}
    stages |= {stage: ms for stage, *ms in watch.table()} if watch.laps else {}
    about = {"frames": frames, "damaged": damaged, "dropped": ahead.dropped, "found": counts,
             "new frames": n, "frames per second": n / seconds, "batch": args.batch,
             "wanted": args.fps if args.video else None,
             "milliseconds: median, 95th, 99th percentile": stages, "note": NOTE}
    with vit.replacing(table.path.with_name("summary.json")) as temporary:
        temporary.write_text(json.dumps(about, indent=1) + "\n")
    return about


def tell(about):
    """The summary for a person."""
    rate = about["frames per second"]
    print(f"\n{about['frames']} frames, {about['new frames']} of them now at {rate:.1f} frames/s; "
          f"{about['damaged']} damaged, {about['dropped']} dropped")
    for key, found in about["found"].items():
        print(f"  {key}: " + ", ".join(f"{name} {n}" for name, n in found.most_common()))
    print(f"  milliseconds a frame (latency: a batch of {about['batch']}):  median    95 %    99 %")
    for stage, ms in about["milliseconds: median, 95th, 99th percentile"].items():
        print(f"  {stage:>30} " + " ".join(f"{value:7.1f}" for value in ms))
    if about["wanted"]:
        keeps = "keeps" if rate >= about["wanted"] else "does not keep"
        print(f"  {keeps} up with the {about['wanted']:g} frames per second that --fps asks for")


def closing_words(args, out, timelines, frames, stopped):
    """What was written, and the next command."""
    overlays = len(list((out / "overlays").glob("*.jpg")))
    words = (f"wrote {out / 'predictions.csv'}; beside it summary.json, {timelines} "
             f"timeline_<video>.png, {overlays} annotated frames in overlays/\n")
    if args.save_video:
        words += f"wrote {args.save_video}\n"
    if stopped:
        return words + "stopped: the same command goes on from here"
    if frames:
        command = ["python", "vit.py", args.checkpoint, frames.path(0), "--show", out / "tokens.png"]
        about = "what the backbone sees in a frame"
    else:
        film = out.with_name(f"{out.name}-film")
        command = ["python", "predict.py", args.checkpoint, "--heads", *args.heads, "--video", args.video,
                   "--out", film, "--save-video", out.with_name(f"{out.name}.mp4")]
        about = "the overlays as a film"
    if frames or not (args.save_video or args.live):
        words += f"next: {shlex.join(map(str, command))}   # {about}\n"
    return words + NOTE


if __name__ == "__main__":
    main()
