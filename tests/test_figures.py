"""figures.py: what the pictures show, read back from their pixels."""
import numpy as np
import pytest
import torch
from PIL import Image

import figures
from vit import build_vit

YELLOW = (255, 230, 0)


def where(image, colour):
    """(n, 2) rows and columns of the pixels of a colour."""
    return np.argwhere((np.asarray(image.convert("RGB")) == colour).all(-1))


# -----------------------------------------------------------------------------------------------
# What the heads say


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_overlay_outlines_the_mask_where_it_lies(kind):
    """A mask of a quarter of the frame's resolution is stretched to it; only its border is
    drawn, and inside it."""
    mask = np.zeros((50, 60), bool)
    mask[20:30, 10:40] = True
    frame = Image.new("RGB", (240, 200), (90, 30, 20))
    drawn = figures.overlay(frame, kind(mask), note="")
    rows, columns = where(drawn, YELLOW).T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (80, 119, 40, 159)
    inside = np.asarray(drawn)[82:118, 42:158].reshape(-1, 3)
    assert (inside == (90, 30, 20)).all()
    assert frame.getcolors() == [(240 * 200, (90, 30, 20))]  # the frame itself is left as it was


def test_overlay_writes_its_lines_above_and_its_note_below():
    frame = Image.new("L", (300, 200), 120)

    def written(**given):
        drawn = np.asarray(figures.overlay(frame, **given))
        return np.argwhere(drawn.min(-1) > 200)  # white, its edges smoothed

    assert len(written(note="")) == 0
    note, lines = written(), written(lines=["cecum 0.93", "Mayo 2"], note="")
    # Without being asked for: it is no medical device
    assert note[:, 0].min() > 170 and note[:, 1].min() > 150
    assert lines[:, 0].max() < 60 and lines[:, 1].max() < 150


def test_overlay_of_an_empty_and_of_a_full_mask():
    frame = Image.new("RGB", (64, 48))
    assert len(where(figures.overlay(frame, np.zeros((48, 64), bool), note=""), YELLOW)) == 0
    # A frame that is all polyp has no outside: no border, no error
    figures.overlay(frame, np.ones((48, 64), bool))


def test_stretches_end_at_other_labels_gaps_and_pauses():
    times = np.array([0, 1, 2, 3, 4, 20, 21, 22])
    values = np.array([1, 1, 2, np.nan, 2, 2, 2, 0])
    same, any_value = ([run.tolist() for run in figures.stretches(times, values, 4, same)]
                       for same in (True, False))
    assert same == [[0, 1], [2], [4], [5, 6], [7]]
    assert any_value == [[0, 1, 2], [4], [5, 6, 7]]


def test_timeline_bars_stand_in_the_row_of_their_class_and_leave_gaps(tmp_path):
    labels = [0, 0, 0, 0, 1, None, 1, 1, 1, 1]
    tracks = [("Mayo", labels, ["0", "1"])]
    figures.timeline(tmp_path / "t.png", "a video", np.arange(10) / 2, tracks)
    with Image.open(tmp_path / "t.png") as picture:
        first, second = (where(picture, tuple(bytes.fromhex(ink[1:])))
                         for ink in figures.TRACK_INKS[:2])
    assert first[:, 0].max() < second[:, 0].min()  # the first class on top
    left, width = 70, 900  # of the axis, beside names of one letter
    assert abs(first[:, 1].min() - left) < 5
    assert abs(first[:, 1].max() - (left + width * 0.4)) < 5
    columns = np.unique(second[:, 1])
    gap = columns[np.flatnonzero(np.diff(columns) > 1)[0]], np.diff(columns).max()
    # The frame that could not be read
    assert abs(gap[0] - (left + width * 0.5)) < 5 and abs(gap[1] - width * 0.1) < 8


@pytest.mark.parametrize("times, values", [([0], [None]), ([0, 0.2], [0.0, 0.0]), ([7.0], [3.5])])
def test_timeline_of_next_to_nothing(tmp_path, times, values):
    figures.timeline(tmp_path / "t.png", "", times, [("area", values, None)], seconds=False)
    assert (tmp_path / "t.png").exists()


@pytest.mark.parametrize("span, expected", [((0, 8), "0:00 0:01 0:02"), ((65, 400), "2:00 3:00 4:00"),
                                            ((0, 7200), "0:00 20:00 40:00"), ((0, 90000), "0:00")])
def test_clock_writes_few_round_times(span, expected):
    words = list(figures.clock(*span, True).values())
    assert " ".join(words).startswith(expected) and (len(words) <= 10 or span[1] > 36000)


# -----------------------------------------------------------------------------------------------
# Pages of pictures


def test_grid_puts_every_picture_below_its_caption_and_beside_its_neighbour():
    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (20, 50), "blue")
    page = figures.grid([[("", red), ("", blue)], [], [("two\nlines", blue), ("", red)]], gap=5)
    # 5 + 50 + (2 lines of 12 and 4) + 5 + 50 + 5; 5 + 40 + 5 + 20 + 5
    assert page.size == (75, 5 + 50 + 5 + 28 + 50 + 5)
    assert page.getpixel((5, 5)) == page.getpixel((44, 34)) == (255, 0, 0)
    assert page.getpixel((50, 5)) == page.getpixel((5, 88)) == page.getpixel((24, 137)) == (0, 0, 255)
    assert page.getpixel((30, 88)) == (255, 0, 0)
    assert page.crop((0, 60, 75, 88)).getextrema()[0][0] < 100  # the words


def test_grid_is_wide_enough_for_its_words_and_keeps_columns():
    dot = Image.new("RGB", (10, 10))
    assert figures.grid([[("a caption that is longer than its picture", dot)]]).width > 150
    assert figures.grid([[("", dot), ("", dot)]], width=100).getpixel((104, 5)) == (0, 0, 0)


def test_contact_sheet_leaves_a_frame_white_that_cannot_be_read(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not a picture")

    class Frames:
        path = staticmethod(lambda i: tmp_path / ("good.png", "bad.png")[i])

    groups = [("kept: 2", np.array([0, 1])), ("dropped: 0", np.array([], int))]
    figures.contact_sheet(tmp_path / "new" / "sheet.png", Frames, groups, side=40)
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.size == (2 + 2 * 42, 2 + 16 + 40 + 2)
        assert sheet.getpixel((20, 40)) == (255, 0, 0) and sheet.getpixel((62, 40)) == (255, 255, 255)
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["sheet.png"]


def test_tokens_of_two_models_stand_side_by_side(tmp_path):
    models = {name: build_vit("vitt14", depth=2, image_size=28).eval() for name in ("a.pt", "b.pt")}
    Image.radial_gradient("L").resize((56, 28)).save(tmp_path / "i.png")
    mask = np.zeros((28, 56), bool)
    mask[:14, :28] = True
    figures.tokens(models, [tmp_path / "i.png"], tmp_path / "o.png", size=56, tile=224, masks=[mask])
    with Image.open(tmp_path / "o.png") as picture:
        assert picture.size == (4 + 5 * 228, 4 + 28 + 112 + 4)
        rows, columns = where(picture, YELLOW).T
    assert (rows.max(), columns.max()) == (32 + 55, 4 + 111)  # the mask's corner, on the image alone
    with pytest.raises(ValueError):
        figures.tokens(models, [tmp_path / "i.png"], tmp_path / "o.png", masks=[mask, mask])
