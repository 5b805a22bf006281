"""``crossmask data check``: what it prints, writes and returns, and what it says of captions, groups and splits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from planted_defects import CSV_DEFECTS, clean, plant, png, write_lines

from crossmask.engine.cli import main
from crossmask.engine.data.complaints import KINDS
from crossmask.engine.data_check import check_data, command
from crossmask.engine.data_check.captions import broken_encoding, judge
from crossmask.engine.data_check.command import find_source
from crossmask.engine.data_check.sheet import _font, wrapped
from crossmask.engine.errors import DataError, RecipeError


def check(path: Path | str, *overrides: str, output: Path | None = None) -> tuple[int, dict[str, Any]]:
    """The exit code, and what stands in the JSON."""
    file = Path(os.environ["PYTEST_FOLDER"]) / "check.json"
    code, lines = check_data(str(path), ["data.validation_fraction=0", *overrides], output, file, 6)
    assert str(file) in lines
    return code, json.loads(file.read_text())


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_FOLDER", str(tmp_path_factory.mktemp("written")))


def pictures(folder: Path, count: int, seed: int = 0) -> list[str]:
    found = clean(seed).items[:count]
    for item in found:
        (folder / f"{item.name}.png").write_bytes(item.image)
    return [f"{item.name}.png" for item in found]


def lines(folder: Path, rows: list[dict[str, Any]], name: str = "pairs.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder / name


def kinds(found: dict[str, Any]) -> dict[str, int]:
    return dict(found["kinds"])


# The command ----------------------------------------------------------------------------------------------------------


def test_a_clean_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = write_lines(clean(3), tmp_path, "csv")
    picture = tmp_path / "new" / "sheet.png"
    code, found = check(path, output=picture)
    assert (code, found["defects"], found["findings"], found["complete"]) == (0, 0, [], True)
    assert (found["pairs"], found["images"], found["decoded"]) == (60, 60, 60)
    assert found["splits"] == {"training": {"pairs": 60, "images": 60}}
    assert found["pairs per group"] == {"1": 60}
    assert found["modes"] == {"RGB": 60}
    assert 40 <= found["image sizes"]["width"]["least"] <= found["image sizes"]["width"]["greatest"] < 60
    assert Image.open(picture).width > 1000
    assert [file.name for file in picture.parent.iterdir()] == ["sheet.png"]
    assert "60 pairs, 60 images" in capsys.readouterr().out


def test_a_set_with_defects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plant(1, CSV_DEFECTS)
    path, place = write_lines(found, tmp_path, "csv")
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    code, told = check(path, output=one)
    check(path, output=other)
    assert one.read_bytes() == other.read_bytes()  # the same pairs are drawn again
    assert code == 1
    assert len(told["findings"]) == sum(told["kinds"].values()) == 20
    assert told["defects"] == sum(finding["defect"] for finding in told["findings"])
    missing = next(finding for finding in told["findings"] if finding["kind"] == "missing image")
    assert missing["where"] == place(next(p.item for p in found.planted if p.kind == "missing image"))
    copy = next(finding for finding in told["findings"] if finding["kind"] == "duplicate image")
    assert len(copy["images"]) == 2
    out = capsys.readouterr().out
    assert all(kind in out for kind in told["kinds"])
    assert all(kind in KINDS for kind in told["kinds"])


def test_exit_codes_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    names = pictures(tmp_path, 2)
    good = lines(tmp_path, [{"image": name, "caption": f"thing {name[:3]}"} for name in names])
    bad = lines(tmp_path, [{"image": "lost.png", "caption": "a hat"}], "bad.jsonl")

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["crossmask", "data", "check", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    assert run(str(good)) == 0
    assert (tmp_path / "check.png").is_file()
    assert run(str(bad), "--pairs", "0") == 1  # nothing is left, and that is not the end of it
    assert run(str(tmp_path / "no.csv")) == 2
    assert "no such file" in capsys.readouterr().err
    assert run("syncmask-emoji") == 2
    assert "data.source is emoji" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "error", "part"),
    [
        ("syncmask-emojy", RecipeError, "did you mean the recipe syncmask-emoji"),
        ("nowhere.jsonl", RecipeError, "no such file or folder; give what data.path takes"),
        (__file__, DataError, "must end in .jsonl"),
    ],
)
def test_what_cannot_be_opened(source: str, error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        check_data(source, [], None, None, 1)


def test_outputs_are_looked_at_first(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--output: a.doc .* end it in one of .png"):
        check_data("x.csv", [], Path("a.doc"), None, 1)
    with pytest.raises(RecipeError, match=r"--json: a.txt .* .json"):
        check_data("x.csv", [], None, Path("a.txt"), 1)
    (tmp_path / "file").write_text("")
    path, _ = write_lines(clean(3), tmp_path, "csv")
    with pytest.raises(RecipeError, match="cannot be written"):
        check_data(str(path), [], None, tmp_path / "file" / "check.json", 1)


def test_a_recipe_brings_its_data(tmp_path: Path) -> None:
    path, _ = write_lines(clean(3), tmp_path, "jsonl")
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"data: {{source: pairs, path: {path}, max_words: 2}}\n")
    assert kinds(check(recipe)[1]) == {"long caption": 60}
    assert check(recipe, "data.max_words=3")[0] == 0
    assert find_source(str(path), ["data.max_words=7"]).data.max_words == 7


def test_a_check_that_is_stopped_says_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = pictures(tmp_path, 12)
    rows = [{"image": name, "caption": f"thing {name}" if n else " "} for n, name in enumerate(names)]
    look = command.looks

    def stopped(*arguments: Any) -> Any:
        for number, found in enumerate(look(*arguments)):
            if number == 5:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(command, "looks", stopped)
    picture = tmp_path / "sheet.png"
    code, found = check(lines(tmp_path, rows), output=picture)
    assert (code, found["complete"], found["decoded"]) == (130, False, 5)
    assert kinds(found) == {"empty caption": 1}
    assert picture.is_file()


# Captions, groups and splits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "told"),
    [
        ("a café in São Paulo, 20 °C", []),
        ("CAFÉ» “quoted” – dash… ™ Ñandú naïve Ærø ÀÉÎÕÜ", []),
        ("ein Tisch für zwölf, Größe £5 · ½", []),
        ("кошка на окне, 猫と窓, قطة, นกแก้ว", []),
        ("family 👨‍👩‍👧 with a \u200djoiner", []),
        ("cafÃ© au lait", ["broken encoding"]),
        ("itâ€™s a hat", ["broken encoding"]),
        ("20 Â°C", ["broken encoding"]),
        ("lost \ufffd letter", ["broken encoding"]),
        ("smile ðŸ˜€", ["broken encoding"]),
        ("a\x00b", ["control characters"]),
        ("turned \u202eround", ["control characters"]),
        ("two\tcolumns\nand lines", []),
        ("IMG_2041.JPG", ["file name as caption"]),
        ("photos/summer/IMG 2041.jpeg", ["file name as caption"]),
        ("a scan of a .jpg file", []),
        ("https://example.com/a.jpg", ["link as caption"]),
        ("see www.example.com for more", []),
        ("<p>a hat</p>", ["markup in a caption"]),
        ("salt &amp; pepper", ["markup in a caption"]),
        ("5 < 6 & 7 > 3", []),
        ("a hat\nb.png,a coat\nc.png,a shoe", ["swallowed lines"]),
    ],
)
def test_captions_are_judged(caption: str, told: list[str]) -> None:
    assert [kind for kind, _ in judge(caption)] == told


def test_broken_encodings_are_put_right() -> None:
    for letter in ("é", "’", "😀", "ü", "ß"):
        assert broken_encoding(f"x {letter.encode().decode('cp1252', 'replace')} y") in (letter, "")


def test_a_quote_that_is_not_closed(tmp_path: Path) -> None:
    names = pictures(tmp_path, 4)
    text = "image,caption\n" + "".join(f"{name},{'' if n != 1 else chr(34)}thing {n}\n" for n, name in enumerate(names))
    (tmp_path / "pairs.csv").write_text(text)
    _, found = check(tmp_path / "pairs.csv")
    assert kinds(found) == {"swallowed lines": 1}
    assert "runs over 3 lines" in found["findings"][0]["line"]


def test_common_captions_and_giant_groups(tmp_path: Path) -> None:
    names = pictures(tmp_path, 50)
    rows = [{"image": name, "caption": "no title" if n % 4 == 0 else f"thing {n}"} for n, name in enumerate(names)]
    _, found = check(lines(tmp_path, rows))
    assert kinds(found) == {"common caption": 1}
    assert found["findings"][0]["line"].endswith("is that of 13 images, 26.0% of them")
    for n, row in enumerate(rows):
        row["group"] = "all" if n < 30 else str(n)
    _, found = check(lines(tmp_path, rows))
    assert kinds(found) == {"common caption": 1, "giant group": 1}
    assert found["most pairs per group"] == 30


def test_images_that_are_trained_on_and_validated(tmp_path: Path) -> None:
    names = pictures(tmp_path, 8)
    rows = [{"image": name, "caption": f"thing {n}"} for n, name in enumerate(names)]
    train = lines(tmp_path, rows[:6])
    (tmp_path / "copy.png").write_bytes((tmp_path / names[1]).read_bytes())
    others = [rows[0] | {"caption": "another"}, rows[6], rows[7], {"image": "copy.png", "caption": "a copy"}]
    held = lines(tmp_path, others, "held.jsonl")
    code, found = check(train, f"data.validation_path={held}")
    assert (code, kinds(found)) == (1, {"duplicate image": 1, "trained and validated": 2})
    assert [f["where"] for f in found["findings"] if f["kind"] == "trained and validated"] == [
        f"{train} line 1", f"{held} line 4",
    ]  # fmt: skip
    assert found["splits"] == {"training": {"pairs": 6, "images": 6}, "validation": {"pairs": 4, "images": 4}}


# The other layouts ----------------------------------------------------------------------------------------------------


def test_a_benchmarks_file(tmp_path: Path) -> None:
    names = pictures(tmp_path, 6)

    def entry(name: str, split: str, *captions: str) -> dict[str, Any]:
        return {"filename": name, "split": split, "sentences": [{"raw": caption} for caption in captions]}

    images = [
        entry(names[0], "train", "a hat", "the hat", "a hat"),
        entry(names[1], "training", "a coat"),
        entry(names[2], "val", "a shoe", ""),
        entry("lost.jpg", "test", "a bag"),
        entry(names[3], "test", "of the"),
        entry(names[2], "test", "a shoe again"),
        {"split": "val", "sentences": []},
    ]
    (tmp_path / "d.json").write_text(json.dumps({"images": images}))
    _, found = check(tmp_path / "d.json")
    assert kinds(found) == {
        "unknown split": 1, "listed twice": 1, "no image named": 1, "missing image": 1, "empty caption": 1,
        "wordless caption, left out": 1, "repeated caption": 1,
    }  # fmt: skip
    rows = [{"image": names[0], "caption": ["a hat", 5]}, {"image": "../x.png", "caption": "y"}]
    (tmp_path / "l.json").write_text(json.dumps(rows)[:-1] + ', {"image": "' + names[1])
    _, found = check(tmp_path / "l.json")
    assert kinds(found) == {"wrong type": 1, "outside the root": 1, "not JSON": 1}
    assert found["pairs"] == 1


def test_a_folder(tmp_path: Path) -> None:
    for name in pictures(tmp_path, 6):
        (tmp_path / name).with_suffix(".txt").write_text(f"thing {name}")
    first, second, third, *_ = sorted(tmp_path.glob("*.png"))
    first.with_suffix(".txt").write_bytes(b"caf\xe9")
    second.with_suffix(".txt").write_text("\n")
    third.with_suffix(".jpg").write_bytes(png(Image.fromarray(np.eye(40, dtype=np.uint8) * 255), "JPEG"))
    (tmp_path / "lost.txt").write_text("a hat")
    code, found = check(tmp_path)
    assert code == 1
    assert kinds(found) == {"not UTF-8": 1, "empty caption": 1, "ambiguous image": 1, "caption without image": 1}
    assert {f["where"] for f in found["findings"]} >= {str(first.with_suffix(".txt")), str(tmp_path / "lost.txt")}


def test_lines_of_the_picture() -> None:
    font = _font(12)
    short = wrapped("a hat with a feather " * 9, 168, font, 3)
    assert len(short) == 3
    assert short[-1].endswith("…")
    assert all(font.getlength(line) <= 168 for line in [*short, *wrapped("x" * 90, 168, font, 9)])
    assert wrapped("a\x00b\tc", 168, font, 2) == ["a\N{REPLACEMENT CHARACTER}b c"]
    assert wrapped("", 168, font, 2) == []
