"""The heads that the probes trained, on frames or a video of your own: one backbone pass for all of them. Not a medical device.

    python predict.py A.pt --heads A.landmarks.linear.pt A.polyps.linear.pt --data FRAMES --out OUT
    python predict.py A.pt --heads A.polyps.linear.pt --video colonoscopy.mp4 --save-video annotated.mp4 --out OUT
    python predict.py A.pt --heads A.polyps.linear.pt --video /dev/video0 --overlays none --out OUT     # live: Ctrl-C ends it

The probes write their heads beside the checkpoint as <checkpoint>.<task>.<head>.pt. Heads of one view (how a frame becomes
a square) and one size share a pass of the backbone. OUT gets predictions.csv (a row per frame: labels, probabilities, area
and box of the polyp), overlays/, timeline pictures and summary.json. The same command goes on where it was stopped.
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


# ---------------------------------------------------------------------------------------------------------------------
# Frames from a folder, a video file or a camera: (name, video, seconds, PIL image or None, what was wrong)


def folder_frames(frames, start):
    """The frames of a data.Frames from number `start` on, damaged ones as a message. Folders know no time: None."""
    for i in range(start, len(frames)):
        try:
            yield frames.name(i), frames.video(i), None, data.read_image(frames.path(i)), ""
        except data.BadImage as error:
            yield frames.name(i), frames.video(i), None, None, str(error)


class Video:
    """Frames of a file, a camera or a stream through a pipe from ffmpeg, as PPM: each frame says its own size.

    One frame at a time is held, so an hour's video needs no more memory than a second's."""

    def __init__(self, source, fps, start=0):
        self.source, self.fps, self.start = source, fps, start
        wanted = f"fps={fps:g}" + (f",trim=start_frame={start},setpts=PTS-STARTPTS" if start else "")
        self.errors = tempfile.TemporaryFile()  # a file, not a pipe: nobody need drain it for ffmpeg to go on
        self.process = ffmpeg("-i", source, "-vf", wanted, "-f", "image2pipe", "-c:v", "ppm", "-",
                              stdout=subprocess.PIPE, stderr=self.errors)

    def __iter__(self):
        name, n = os.path.basename(self.source), self.start
        with self:
            while (image := read_ppm(self.process.stdout)) is not None:
                yield f"{name}:{n:06d}", name, n / self.fps, image, ""
                n += 1
            self.check(n)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """End ffmpeg, whether it has come to the end of its input or not."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def check(self, n):
        """SystemExit with ffmpeg's own last words where it failed."""
        code = self.process.wait()
        self.errors.seek(0)
        words = self.errors.read().decode(errors="replace").strip().splitlines()
        if code or n == self.start == 0:
            raise SystemExit(f"--video {self.source}: ffmpeg ended with code {code} after {n} frames: "
                             f"{words[-1] if words else 'it said nothing; is there a picture in it?'}")


def ffmpeg(*words, **pipes):
    """Start ffmpeg, quiet and without a keyboard."""
    if shutil.which("ffmpeg") is None:
        raise SystemExit("ffmpeg is not installed: --video and --save-video need it on the PATH")
    return subprocess.Popen(["ffmpeg", "-nostdin", "-v", "error", *words], stdin=pipes.pop("stdin", subprocess.DEVNULL), **pipes)


def read_ppm(stream):
    """The next binary PPM of a stream as a PIL image; None at its end, or where it was cut short."""
    if stream.readline().strip() != b"P6":
        return None
    width, height = map(int, stream.readline().split())
    stream.readline()  # the largest value: 255
    pixels = stream.read(3 * width * height)
    return Image.frombytes("RGB", (width, height), pixels) if len(pixels) == 3 * width * height else None


class Ahead:
    """Read an iterator on a thread, some items ahead, so that decoding and computing overlap. With newest=True, as live
    input asks, an item that nobody has taken yet gives way to the next one and is counted in `dropped`."""

    def __init__(self, items, room=16, newest=False):
        self.queue, self.newest, self.dropped = queue.Queue(1 if newest else room), newest, 0
        self.ended, self.seconds = threading.Event(), []  # seconds: what each item took to read
        threading.Thread(target=self.read, args=(iter(items),), daemon=True).start()

    def read(self, items):
        last = None  # the mark of the end, or what went wrong: it is raised where the items are taken
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
    """Lists of `size` items, the last one shorter. (itertools.batched is there from Python 3.12 on.)"""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Passes: what the backbone computes, and for which heads


@dataclasses.dataclass(frozen=True)
class Pass:
    """One run of the backbone on a batch: how frames become squares, whether mirrored, and the heads that it serves."""
    view: str
    size: int
    mirror: bool
    keys: tuple


def plan(loaded, scales):
    """As few passes as the heads {key: frozen.Head} need. A boosted head is read at its own size alone, or at every
    one of `scales` times that size and mirrored as well, which is how the probe tests it."""
    wanted = collections.defaultdict(list)
    for key, head in loaded.items():
        boosted = head.name == "boosted" and scales
        for scale, mirror in itertools.product(scales if boosted else [1], (False, True) if boosted else (False,)):
            wanted[head.view, round(head.size * scale / 14) * 14, mirror].append(key)
    return [Pass(*how, tuple(keys)) for how, keys in wanted.items()]


@torch.no_grad()
def predict(model, loaded, passes, images, dtype, watch):
    """What every head says of PIL images: for each {key: probabilities, (C,) of a classifier or (H, W) of a polyp map}.
    The Stopwatch `watch` gets the seconds of each stage."""
    found = [collections.defaultdict(list) for _ in images]
    for one in passes:
        with watch("squares"):
            squares = torch.stack([data.square(image, one.size, one.view) for image in images])      # (B, 3, S, S)
            squares = (squares.flip(-1) if one.mirror else squares).to(model.pos_embed.device)
        with watch("backbone"):
            tokens_of = frozen.shared_tokens(model, [loaded[key] for key in one.keys], squares, dtype)
        for key in one.keys:
            with watch(key):
                answer = loaded[key](tokens_of(loaded[key]))
                for i, image in enumerate(images):
                    if loaded[key].task == "polyps":
                        seen = heads.resize(answer[i], (image.height, image.width)).sigmoid()        # (H, W)
                        found[i][key].append((seen.flip(-1) if one.mirror else seen).cpu())
                    else:
                        found[i][key].append(answer[0][i])                                           # (C,)
    return [{key: torch.stack(seen).mean(0).numpy() for key, seen in said.items()} for said in found]


class Stopwatch:
    """with watch("backbone"): ... adds up the seconds of a stage until `lap` puts them down, shared by n frames."""

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
        """Rows of (stage, median, 95th and 99th percentile in ms per frame), then the latency: the whole batch's."""
        stages = dict.fromkeys(stage for _, lap in self.laps for stage in lap)
        rows = [(stage, [1e3 * lap.get(stage, 0) / n for n, lap in self.laps]) for stage in stages]
        rows += [("latency", [1e3 * sum(lap.values()) for _, lap in self.laps])]
        return [(stage, *np.percentile(ms, (50, 95, 99)).tolist()) for stage, ms in rows]


# ---------------------------------------------------------------------------------------------------------------------
# What is written: predictions.csv, a row per frame, and what is drawn from it


def columns_of(heads, window):
    """The names of a row's columns; those of smoothed labels say so."""
    smooth = f" (running mean of {window} frames)" if window > 1 else ""
    columns = ["path", "video", "seconds", "error"]
    for key, head in heads.items():
        if head.task == "polyps":
            columns += [f"{key} area", f"{key} box"]
        else:
            columns += [f"{key} label{smooth}"] + [f"{key} p({c})" for c in head.classes]
    return columns


def probabilities_in(row, key, head):
    """(C,) probabilities of a row's columns, or None for a damaged frame."""
    words = [row.get(f"{key} p({c})") for c in head.classes]
    return np.array(words, float) if all(words) else None


def label_of(head, p):
    """The class that probabilities (C,) mean: the median grade of an ordinal head, else the likeliest class."""
    place = np.searchsorted(p.cumsum(), 0.5) if head.name == "ordinal" else p.argmax()
    return head.classes[min(int(place), len(p) - 1)]


class Smoothed:
    """The label of the mean of the last `window` frames' probabilities, within one video. It is computed from the
    probabilities as the CSV states them, so that a run that goes on from the CSV writes what an unbroken one writes."""

    def __init__(self, head, key, window):
        self.head, self.key, self.window, self.video = head, key, window, None
        self.last = collections.deque(maxlen=window)

    def __call__(self, row):
        if row["video"] != self.video:
            self.last.clear()
            self.video = row["video"]
        if (p := probabilities_in(row, self.key, self.head)) is None:
            return ""
        self.last.append(p)
        return label_of(self.head, np.mean(self.last, 0))


def box_of(mask):
    """"left top right bottom" in pixels, the last two exclusive, of the True pixels of (H, W); "" where there are none."""
    if not mask.any():
        return ""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return f"{columns[0]} {rows[0]} {columns[-1] + 1} {rows[-1] + 1}"


class Table:
    """predictions.csv. Opened again it goes on after its last whole row, if it was made by the same heads from the same
    frames (run.json tells); `done` is the number of rows that are there."""

    def __init__(self, out, about, columns):
        self.path, self.columns = out / "predictions.csv", columns
        out.mkdir(parents=True, exist_ok=True)
        said = out / "run.json"
        if said.exists() and (old := json.loads(said.read_text())) != about:
            differ = ", ".join(k for k in about.keys() | old.keys() if about.get(k) != old.get(k))
            raise SystemExit(f"--out {out} holds predictions made with another {differ}: name another folder, or remove it")
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
    """A row of the table: frame (path, video, seconds, image, error), said {key: probabilities} or None."""
    path, video, seconds, image, error = frame
    row = {"path": path, "video": video, "seconds": "" if seconds is None else f"{seconds:.3f}", "error": error}
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
            lines.append(f"{key}: {row[labels[key]]} ({probabilities_in(row, key, head).max():.0%})")
    return figures.overlay(frame[3], mask, lines, NOTE)


def draw_timelines(table, loaded, labels, out):
    """timeline_<video>.png of every video of two or more frames; returns their paths."""
    paths, number = [], {key: {c: i for i, c in enumerate(head.classes)} for key, head in loaded.items()}
    for video, rows in itertools.groupby(table.rows(), key=lambda row: row["video"]):
        rows = list(rows)
        if len(rows) < 2:
            continue
        timed = all(row["seconds"] for row in rows)
        tracks = []
        for key, head in loaded.items():
            if head.task == "polyps":
                areas = [float(row[f"{key} area"]) if row[f"{key} area"] else None for row in rows]
                tracks.append((f"{key}: share of the frame", areas, None))
            else:
                tracks.append((key, [number[key].get(row[labels[key]]) for row in rows], head.classes))
        path = out / f"timeline_{re.sub('[^A-Za-z0-9]+', '-', video).strip('-') or 'frames'}.png"
        times = [float(row["seconds"]) for row in rows] if timed else range(len(rows))
        figures.timeline(path, f"{video or 'frames'}: {NOTE}", times, tracks, seconds=timed)
        paths.append(path)
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=NOTE)
    flag = parser.add_argument
    flag("checkpoint", help="the backbone that the heads were fitted on")
    flag("--heads", nargs="+", required=True, metavar="FILE", help="<checkpoint>.<task>.<head>.pt as the probes write them")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="FRAMES", help="folder of frames (a sub-folder counts as a video) or manifest.csv")
    source.add_argument("--video", metavar="FILE", help="video file; or a camera or stream that ffmpeg reads: then live, which "
                        "takes the newest frame and counts those that it had to drop")
    flag("--out", required=True, metavar="OUT", help="folder to write; the same command goes on in it where it was stopped")
    flag("--fps", type=float, default=25.0, help="frames to look at in a second of --video (default: %(default)g)")
    flag("--save-video", metavar="OUT.mp4", help="the overlays as a video")
    flag("--overlays", default="20", metavar="none|N|all", help="how many annotated frames to draw, at even distances among those "
         "of a folder; of a video, one in so many as to give about N an hour (default: %(default)s)")
    flag("--scales", type=float, nargs="+", help="read a boosted polyp head at these multiples of its size and mirrored as well, as "
         "its probe does: better and several times slower (default: its own size alone)")
    flag("--smooth", type=int, default=1, metavar="N", help="label by the mean probabilities of the last N frames (default: %(default)s, "
         "off); the table's header says so")
    flag("--batch", type=int, help="frames per pass of the backbone (default: 8; live 1)")
    flag("--precision", default="auto", choices=("auto", *vit.PRECISIONS), help="type of the products (default: auto, what the hardware has)")
    flag("--device", default="auto", help="cpu or cuda (default: a GPU if there is one)")
    args = parser.parse_args(argv)
    args.live = args.video is not None and not os.path.isfile(args.video)
    args.batch = args.batch or (1 if args.live else 8)
    args.device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if args.overlays not in ("none", "all") and not args.overlays.isdigit():
        parser.error(f"--overlays {args.overlays}: none, all or a number")
    if args.fps <= 0 or min(args.smooth, args.batch) < 1 or min(args.scales or [1]) <= 0:
        parser.error("--fps and --scales must be positive, --smooth and --batch at least 1")
    if args.save_video and not args.video:
        parser.error("--save-video needs --video")
    return args


def open_heads(args, model):
    """{key: frozen.Head}: a head is called by its task and name; of two the same, by its file."""
    loaded = {}
    for path in args.heads:
        head = frozen.load_head(path, model)
        key = f"{head.task} {head.name}"
        loaded[key if key not in loaded else pathlib.Path(path).stem] = head
    return loaded


def every(args, n):
    """Draw one frame in so many."""
    if args.overlays in ("none", "all"):
        return {"none": None, "all": 1}[args.overlays]
    total = n if n else 3600 * args.fps
    return max(1, int(total // max(int(args.overlays), 1))) if int(args.overlays) else None


def main(argv=None):
    args = parse(argv)
    with frozen.one_sentence():
        model = vit.load_backbone(args.checkpoint, args.device).requires_grad_(False)
        loaded = open_heads(args, model)
        frames = data.Frames(args.data) if args.data else None
    dtype, passes = vit.precision(args.device, args.precision), plan(loaded, args.scales)
    print(f"{len(loaded)} heads on {len(passes)} passes of the backbone ({str(dtype).removeprefix('torch.')}): "
          + "; ".join(f"{one.size} px {one.view}{' mirrored' * one.mirror}: {', '.join(one.keys)}" for one in passes))
    out = pathlib.Path(args.out)
    about = {"checkpoint": frozen.digest(model), "heads": {key: frozen.digest(h.network) for key, h in loaded.items()},
             "source": os.path.abspath(args.data or args.video), "frames per second": None if args.data else args.fps,
             "smoothing": args.smooth, "scales": args.scales, "precision": str(dtype), "note": NOTE}
    table = Table(out, about, columns_of(loaded, args.smooth))
    return run(args, model, loaded, passes, dtype, frames, table, out)


def run(args, model, loaded, passes, dtype, frames, table, out):
    """Every frame from where the table ends: predict, write its row, draw it; then the pictures and the summary."""
    if table.done:
        print(f"going on after {table.done} frames in {table.path}")
    source = folder_frames(frames, table.done) if frames else iter(Video(args.video, args.fps, 0 if args.live else table.done))
    ahead = Ahead(source, newest=args.live)
    labels = {key: column for column in table.columns for key in loaded if column.startswith(f"{key} label")}
    smooth = {key: Smoothed(loaded[key], key, args.smooth) for key in labels}
    for row in table.rows():  # what an unbroken run would remember here
        for key in smooth:
            smooth[key](row)
    watch, gap, n, damaged = Stopwatch(args.device), every(args, frames and len(frames)), table.done, 0
    film = Film(args.save_video, args.fps, n) if args.save_video else contextlib.nullcontext()
    began = time.perf_counter()
    bar = tqdm(total=frames and len(frames), initial=n, unit="frame", desc="predict", disable=None)
    with film, bar, stop_politely() as stopped:
        for batch in in_batches(ahead, args.batch):
            good = [frame[3] for frame in batch if frame[3] is not None]
            answers = iter(predict(model, loaded, passes, good, dtype, watch) if good else ())
            for frame in batch:
                said = next(answers) if frame[3] is not None else None
                row = row_of(frame, said, loaded)
                row |= {labels[key]: smooth[key](row) for key in labels}
                if said and (args.save_video or gap and n % gap == 0):
                    with watch("overlay"):
                        picture = drawn(frame, said, row, loaded, labels)
                    if args.save_video:
                        film.add(picture)
                    if gap and n % gap == 0:
                        save_overlay(picture, out, n, frame[0])
                table.write(row)
                n, damaged = n + 1, damaged + (said is None)
            watch.lap(len(batch))
            bar.update(len(batch))
            if stopped:
                break
    table.file.close()
    pictures = draw_timelines(table, loaded, labels, out)
    return summarise(args, loaded, passes, table, watch, ahead, n - table.done, damaged, time.perf_counter() - began, pictures, stopped)


@contextlib.contextmanager
def stop_politely():
    """A list that a first Ctrl-C fills, so that the batch at hand is still written; a second one ends at once."""
    asked = []

    def handler(number, frame):
        asked.append(number)
        signal.signal(signal.SIGINT, before)
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def save_overlay(picture, out, n, name):
    (out / "overlays").mkdir(exist_ok=True)
    words = re.sub("[^A-Za-z0-9]+", "-", os.path.splitext(name)[0]).strip("-")[-80:]
    picture.save(out / "overlays" / f"{n:07d}_{words}.jpg", quality=92)


class Film:
    """The overlays as a video, through a pipe to ffmpeg; it has its name when it is whole."""

    def __init__(self, path, fps, start):
        self.path, self.process, self.fps = pathlib.Path(path), None, fps
        self.part = self.path.with_name(f".{self.path.stem}.part{self.path.suffix}")
        self.errors = tempfile.TemporaryFile()
        if start:
            print(f"--save-video {path} begins at frame {start}: what was drawn before went with the run that was stopped")

    def __enter__(self):
        self.process = ffmpeg("-y", "-f", "image2pipe", "-c:v", "ppm", "-framerate", f"{self.fps:g}", "-i", "-",
                              "-vf", "crop=trunc(iw/2)*2:trunc(ih/2)*2", "-pix_fmt", "yuv420p", str(self.part),
                              stdin=subprocess.PIPE, stderr=self.errors)
        return self

    def add(self, picture):
        try:
            picture.save(self.process.stdin, "PPM")
        except BrokenPipeError:
            self.finish()
            raise SystemExit(f"--save-video {self.path}: ffmpeg ended early") from None

    def __exit__(self, *_):
        self.finish()

    def finish(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        if self.process.wait():
            self.errors.seek(0)
            words = self.errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise SystemExit(f"--save-video {self.path}: ffmpeg failed: {words[-1]}")
        os.replace(self.part, self.path)


def summarise(args, loaded, passes, table, watch, ahead, n, damaged, seconds, pictures, stopped):
    """Print and write (summary.json) what was found and how long it took."""
    counts = {key: collections.Counter() for key in loaded}
    for row in table.rows():
        for key, head in loaded.items():
            if head.task == "polyps":
                counts[key]["with polyp"] += bool(row[f"{key} box"])
            else:
                counts[key][next(row[c] for c in table.columns if c.startswith(f"{key} label"))] += 1
    decode = np.percentile([1e3 * s for s in ahead.seconds] or [0], (50, 95, 99)).tolist()
    times = [("decode", *decode), *watch.table()] if watch.laps else []
    rate = n / seconds if n else 0.0
    about = {"frames": sum(1 for _ in table.rows()), "new frames": n, "damaged": damaged, "dropped": ahead.dropped,
             "frames per second": rate, "batch": args.batch, "milliseconds": {stage: ms for stage, *ms in times},
             "found": counts, "note": NOTE}
    with vit.replacing(table.path.with_name("summary.json")) as temporary:
        temporary.write_text(json.dumps(about, indent=1) + "\n")
    print(f"\n{about['frames']} frames ({n} new, {damaged} damaged, {ahead.dropped} dropped) in {seconds:.1f} s: {rate:.1f} frames/s")
    for key, found in counts.items():
        print(f"  {key}: " + ", ".join(f"{name or 'damaged'} {k}" for name, k in found.most_common()))
    if times:
        print(f"  ms per frame, batch {args.batch}: median, 95th, 99th percentile")
        print("\n".join(f"  {stage:>20}: {a:7.1f} {b:7.1f} {c:7.1f}" for stage, a, b, c in times))
        print(f"  {'keeps' if rate >= 25 else 'does not keep'} up with 25 frames per second")
    print(f"wrote {table.path}, summary.json" + "".join(f", {path}" for path in pictures) + f"\n{NOTE}")
    if stopped:
        print("stopped; the same command goes on from here")
    return about


if __name__ == "__main__":
    main()
