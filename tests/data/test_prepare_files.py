"""prepare coco, folder and celeba: picture files of all sorts become shards, and every fault is reported in a line."""

import dataclasses
import json
import os
import re
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from duotone.data.image_header import Unreadable
from duotone.data.prepare.celeba import PrepareCeleba
from duotone.data.prepare.coco import PrepareCoco
from duotone.data.prepare.image_folder import CaptionUnused, PrepareFolder, _refuse_duplicate_folder
from duotone.data.prepare.picture_files import class_caption, read_picture
from duotone.data.refusal import Refused
from duotone.data.shards import Shards


def refusal(config):
    with pytest.raises(Refused) as refused:
        config.run()
    assert "\n" not in str(refused.value) and not config.out.exists()
    assert not [path for path in config.out.parent.iterdir() if ".partial" in path.name]
    return str(refused.value)


def images_of(folder, cpu, plan_for, count, **options):
    dataset = Shards(shards=folder, size=64, **options).open(cpu)
    return dataset, dataset.read(plan_for(range(count), captions=[0.99] * count))


@pytest.fixture
def coco(tmp_path, photos):
    """The two photographs in COCO's format, the first with two captions."""
    (tmp_path / "images").mkdir()
    for number, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / "images" / f"{number:012d}.jpg", quality=92)
    content = {
        "images": [{"id": 40 + number, "file_name": f"{number:012d}.jpg"} for number in (1, 0)],
        "annotations": [
            {"id": 1, "image_id": 40, "caption": "A  pagoda by\na lake."},
            {"id": 2, "image_id": 41, "caption": "A flower."},
            {"id": 3, "image_id": 40, "caption": "A temple."},
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    return {"images": tmp_path / "images", "annotations": tmp_path / "captions.json", "out": tmp_path / "out"}


def edit(coco, change):
    content = json.loads(coco["annotations"].read_text())
    change(content)
    coco["annotations"].write_text(json.dumps(content))


def test_coco_keeps_every_caption(coco, cpu, plan_for):
    summary = PrepareCoco(**coco).run()
    assert (summary["images"], summary["skipped"]) == (2, [])
    dataset, batch = images_of(coco["out"], cpu, plan_for, 2)
    assert dataset.captions_at(0) == ["A pagoda by a lake.", "A temple."] and batch.captions == [
        "A temple.",
        "A flower.",
    ]
    assert dataset.keys == ["000000000040", "000000000041"]
    assert dataset.columns["height"].tolist() == [427, 427]  # stored as they came
    assert dataset._bytes.image(0).tobytes() == (coco["images"] / "000000000000.jpg").read_bytes()


@pytest.mark.parametrize(
    "again, said",
    [
        ({"id": 40, "file_name": "else.jpg"}, "lists id 40 twice ('000000000000.jpg', 'else.jpg')"),
        ({"id": 77, "file_name": "./000000000000.jpg"}, "lists '000000000000.jpg' twice (ids 40, 77)"),
    ],
)
def test_coco_lists_an_image_once(coco, again, said):
    edit(coco, lambda content: content["images"].append(again))
    assert refusal(PrepareCoco(**coco, on_bad="skip")).startswith(f"{coco['annotations']}: `images` {said}")


@pytest.mark.parametrize("image_format", ["jpg", "png", "npy"])
def test_coco_shrinks(coco, cpu, plan_for, photos, image_format):
    PrepareCoco(**coco, size=96, image_format=image_format).run()
    dataset, batch = images_of(coco["out"], cpu, plan_for, 2)
    assert dataset.columns["height"].tolist() == [96, 96] and dataset.columns["width"].tolist() == [144, 144]
    plain = [Image.fromarray(photo[:, 106:533]).resize((64, 64), Image.Resampling.LANCZOS) for photo in photos]
    assert np.abs(batch.images_NHWC.numpy().astype(int) - np.stack(plain)).mean() < 6


def test_coco_names_what_is_wrong(coco, photos):
    broken = coco["images"] / "000000000001.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    assert str(broken) in refusal(PrepareCoco(**coco))
    broken.unlink()
    assert f"{broken}: it cannot be read" in refusal(PrepareCoco(**coco))
    broken.write_bytes(whole)
    edit(coco, lambda content: content["annotations"].pop(1))
    assert "000000000001.jpg has no caption" in refusal(PrepareCoco(**coco))
    summary = PrepareCoco(**coco, on_bad="skip").run()
    assert summary["images"] == 1 and summary["skipped"] == [f"{broken}: it has no caption"]
    shutil.rmtree(coco["out"])
    edit(coco, lambda content: content["images"][0].update(file_name="../../etc/passwd"))
    assert "leaves the image folder" in refusal(PrepareCoco(**coco))
    assert "no such folder" in refusal(PrepareCoco(**(coco | {"images": coco["images"] / "missing"})))


@pytest.mark.parametrize("on_bad", ["refuse", "skip"])
def test_a_picture_that_training_would_refuse_is_told_by_name(coco, monkeypatch, on_bad):
    """Captions longer than their limit, and a picture that exceeds its limit only in the form in which it is stored."""
    edit(coco, lambda content: content["annotations"][1].update(caption="x" * (1 << 20)))
    config = PrepareCoco(**coco, on_bad=on_bad)
    if on_bad == "refuse":
        assert "000000000001.jpg: its captions are too long: 10" in refusal(config)
        return
    (skipped,) = config.run()["skipped"]
    assert "000000000001.jpg: its captions are too long" in skipped
    shutil.rmtree(coco["out"])
    edit(coco, lambda content: content["annotations"][1].update(caption="short"))
    Image.new("RGB", (500, 500)).save(coco["images"] / "000000000001.jpg")
    monkeypatch.setattr("duotone.data.prepare.picture_files.MAX_BYTES", 600_000)
    (skipped,) = PrepareCoco(**coco, on_bad=on_bad, size=400, image_format="npy").run()["skipped"]
    assert (
        "000000000000.jpg: stored as npy its 720128 bytes exceed 600000 " in skipped
        and "(a smaller --size, or --image-format jpg," in skipped
    )


def test_a_picture_without_its_transparency_may_be_too_large(tmp_path, photos, monkeypatch):
    Image.fromarray(np.dstack([photos[0], photos[0][:, :, :1]])).save(tmp_path / "a.webp", quality=5)
    monkeypatch.setattr("duotone.data.prepare.picture_files.MAX_BYTES", (tmp_path / "a.webp").stat().st_size)
    with pytest.raises(Unreadable, match="without its transparency it is a PNG whose"):
        read_picture(tmp_path / "a.webp", None)


def test_a_pipe_is_no_picture(coco):
    """Opening it would block the whole preparation."""
    (coco["images"] / "000000000001.jpg").unlink()
    os.mkfifo(coco["images"] / "000000000001.jpg")
    assert "000000000001.jpg: it cannot be read (it is not a file)" in refusal(PrepareCoco(**coco))


@pytest.mark.parametrize("field", ["images", "annotations"])
@pytest.mark.parametrize("number, said", [("1e999", "inf"), ("1.7", "1.7")])
def test_coco_ids_are_whole_numbers(coco, field, number, said):
    edit(
        coco,
        lambda content: content[field][0].update({"id": 77, "image_id": 77} if field == "annotations" else {"id": 77}),
    )
    coco["annotations"].write_text(coco["annotations"].read_text().replace("77", number))
    message = refusal(PrepareCoco(**coco, on_bad="skip"))
    assert message.startswith(f"{coco['annotations']}: an image's id is {said}, which is not a whole number; ")


def test_coco_captions_of_images_that_are_not_listed_are_counted(coco):
    assert PrepareCoco(**coco).run()["captions_of_no_image"] == 0
    shutil.rmtree(coco["out"])
    edit(coco, lambda content: content["annotations"].extend([{"image_id": 7, "caption": "a"}] * 2))
    assert PrepareCoco(**coco, limit=1).run()["captions_of_no_image"] == 2


@pytest.mark.parametrize("text", ["", "[]", "{", '{"images": []}', '{"images": 1, "annotations": 2}', "[" * 100_000])
def test_coco_annotations_that_are_not(coco, text):
    coco["annotations"].write_text(text)
    assert "captions.json" in refusal(PrepareCoco(**coco))


def test_coco_annotations_of_another_kind(coco):
    edit(coco, lambda content: content["annotations"].append({"image_id": 40, "bbox": [1, 2, 3, 4]}))
    assert "without image_id or caption" in refusal(PrepareCoco(**coco))


def test_broken_pictures_can_be_left_out(coco):
    (coco["images"] / "000000000000.jpg").write_bytes(b"not a picture at all")
    summary = PrepareCoco(**coco, on_bad="skip").run()
    assert summary["images"] == 1 and "000000000000.jpg" in summary["skipped"][0]


@pytest.mark.parametrize("on_bad", ["refuse", "skip"])
def test_coco_beside_another_folder(coco, on_bad):
    """Refused even with on_bad skip: skipping missing pictures one by one would leave none."""
    elsewhere = coco["images"].rename(coco["images"].with_name("train2017"))
    message = refusal(PrepareCoco(**(coco | {"images": elsewhere.parent}), on_bad=on_bad))
    assert message.startswith(f"images {elsewhere.parent}: ") and message.endswith(f"pass --images {elsewhere}")


@pytest.fixture
def pictures(tmp_path, photos):
    """save(name, ...): a picture below tmp_path/pictures."""

    def save(name, photo=photos[0][:80, :100], mode="RGB", **options):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(photo)
        image.convert(mode).save(path, **options)
        return path

    return save


def test_folders_are_classes_in_natural_order(tmp_path, pictures, cpu, plan_for):
    for name in ("class 10/a.jpg", "class 9/b10.png", "class 9/b9.webp", "animals/ape/c.JPG", ".hidden/x.jpg"):
        pictures(name)
    (tmp_path / "pictures" / "notes.pdf").touch()
    summary = PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out").run()
    assert summary["classes"] == ["animals/ape", "class 9", "class 10"] and summary["other_files"] == {".pdf": 1}
    dataset, batch = images_of(tmp_path / "out", cpu, plan_for, 4)
    assert batch.labels_N.tolist() == [0, 1, 1, 2]
    assert batch.captions == ["a photo of an ape", *["a photo of a class 9"] * 2, "a photo of a class 10"]
    sources = [json.loads(dataset._bytes._text_member("json", sample))["source"] for sample in range(4)]
    assert sources == ["animals/ape/c.JPG", "class 9/b9.webp", "class 9/b10.png", "class 10/a.jpg"]


def test_a_flat_folder_has_no_classes(tmp_path, pictures, cpu, plan_for):
    for name in ("b.jpg", "a.png"):
        pictures(name)
    PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out").run()
    dataset, batch = images_of(tmp_path / "out", cpu, plan_for, 2)
    assert dataset.classes is None and batch.labels_N is None and batch.captions is None


def test_captions_beside_the_pictures(tmp_path, pictures, cpu, plan_for):
    for name in ("x/b.jpg", "x/a.png"):
        pictures(name).with_suffix(".txt").write_text("one\ntwo\n")
    PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out", classes="none").run()
    dataset, batch = images_of(tmp_path / "out", cpu, plan_for, 2)
    assert batch.captions == ["two", "two"] and dataset.classes is None
    pictures("x/c.jpg")
    config = PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out2", classes="none")
    assert "c.jpg: it has no .txt beside it" in refusal(config)


def test_captions_beside_no_picture_are_told(tmp_path, pictures):
    """Otherwise a caption in a.jpg.txt would be missing silently."""
    named = pictures("cat/a.jpg")
    (tmp_path / "pictures" / "cat" / "a.jpg.txt").write_text("a red cat")
    (tmp_path / "pictures" / "cat" / "b.TXT").touch()
    config = PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out")
    with pytest.warns(
        CaptionUnused,
        match=re.escape(f"2 .txt files have no picture of the same name beside them, the first '{named}.txt'"),
    ):
        summary = config.run()
    assert (summary["captions_of_no_picture"], summary["other_files"]) == (2, {})


def test_the_letters_of_txt_may_be_of_either_case(tmp_path, pictures, cpu):
    pictures("A.JPG").with_suffix(".TXT").write_text("one")
    pictures("b.jpg").with_suffix(".txt").write_text("two")
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptionUnused)
        assert PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out").run()["captions_of_no_picture"] == 0
    dataset = Shards(shards=tmp_path / "out", size=64).open(cpu)
    assert [dataset.captions_at(0), dataset.captions_at(1)] == [["one"], ["two"]]


def test_an_empty_caption_is_no_missing_one(tmp_path, pictures):
    pictures("a.jpg").with_suffix(".txt").write_text("one")
    empty = pictures("b.jpg").with_suffix(".txt")
    empty.write_text("\n")
    config = PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out")
    assert refusal(config).startswith(f"{empty}: it is empty, but ")


def test_a_caption_file_is_cut_at_line_ends_only(tmp_path, pictures, cpu):
    said = "Vintage poster\x85A red fox\u2028by J. Doe\x0b\x0c\x1c\x1d\x1e!"
    pictures("a.jpg").with_suffix(".txt").write_text(f"{said}\ntwo\n", encoding="utf-8")
    PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out").run()
    assert Shards(shards=tmp_path / "out", size=64).open(cpu).captions_at(0) == [said, "two"]


def test_a_name_with_a_line_end_is_refused_in_one_line(tmp_path, pictures):
    pictures("a\nb.jpg").write_bytes(b"")
    config = PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out")
    assert refusal(config).startswith(f"{tmp_path}/pictures/a\\nb.jpg: it is truncated")


def test_folders_that_cannot_be_used(tmp_path, pictures):
    (tmp_path / "pictures").mkdir()
    config = PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out")
    assert "it holds no" in refusal(config)
    pictures("x/a.jpg")
    stray = pictures("b.jpg")
    assert f"{stray}: it lies beside the class folders" in refusal(config)
    stray.unlink()
    (tmp_path / "pictures" / "x" / "z.jpg").write_bytes(b"")
    assert "z.jpg: it is truncated" in refusal(config)


@pytest.mark.parametrize("classes", ["folders", "none"])
def test_pictures_of_other_formats_are_refused_or_told(tmp_path, pictures, classes):
    """Counted only as other files, a class of GIFs would be missing silently."""
    pictures("cats/a.jpg")
    pictures("cats/b.bmp")
    gif = pictures("birds/B.GIF", mode="P")
    (tmp_path / "pictures" / "cats" / "readme").touch()
    config = PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out", classes=classes, caption="")
    assert refusal(config).startswith(f"{gif}: .GIF is not read (in all: 1 .GIF, 1 .bmp); convert ")
    summary = dataclasses.replace(config, on_bad="skip").run()
    assert (summary["images"], summary["classes"]) == (1, ["cats"] if classes == "folders" else None)
    assert summary["skipped"] == [f"{gif}: .GIF is not read", f"{tmp_path}/pictures/cats/b.bmp: .bmp is not read"]
    assert summary["other_files"] == {"without extension": 1}
    about = json.loads((tmp_path / "out" / "dataset.json").read_text())["about"]
    assert about == {"made_by": "prepare folder", "other_files": {"without extension": 1}}


@pytest.mark.parametrize("on_bad", ["refuse", "skip"])
def test_a_folder_of_nothing_that_is_read_names_what_it_holds(tmp_path, pictures, on_bad):
    pictures("cats/a.gif", mode="P")
    (tmp_path / "pictures" / "cats" / os.fsdecode(b"b.\xff")).touch()
    config = PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out", on_bad=on_bad)
    assert "files, but 1 .gif, 1 .\ufffd; " in refusal(config)


def test_a_jfif_is_a_jpeg(tmp_path, pictures, cpu, plan_for):
    path = pictures("cats/a.JFIF", format="JPEG")
    assert PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out").run()["images"] == 1
    dataset, _ = images_of(tmp_path / "out", cpu, plan_for, 1)
    assert dataset._bytes.image(0).tobytes() == path.read_bytes()


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("a.tar.gz", "unpack it (`tar xzf {}`) and give the folder"),
        ("A.ZIP", "unpack it (`unzip {}`) and give the folder"),
        ("a.jpg", "give the folder"),
    ],
)
def test_a_file_in_place_of_a_folder(tmp_path, name, remedy):
    path = tmp_path / name
    path.touch()
    said = refusal(PrepareFolder(images=path, out=tmp_path / "out"))
    assert said == f"images {path}: it is a file; {remedy.format(path)}"


@pytest.mark.parametrize("size", [None, 40])
def test_transparent_becomes_white_and_orientation_is_kept(tmp_path, pictures, photos, cpu, plan_for, size):
    clear = np.dstack([photos[0][:80, :80], np.zeros((80, 80), np.uint8)])
    (tmp_path / "pictures").mkdir()
    Image.fromarray(clear).save(tmp_path / "pictures" / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures("b.jpg", photo=photos[0][:60, :120], exif=exif, quality=95)
    PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out", size=size).run()
    _, batch = images_of(tmp_path / "out", cpu, plan_for, 2, resize="squash")
    assert (batch.images_NHWC[0].numpy() > 250).all()
    turned = Image.fromarray(np.rot90(photos[0][:60, :120], -1)).resize((64, 64))
    assert np.abs(batch.images_NHWC[1].numpy().astype(int) - np.asarray(turned)).mean() < 8


def test_a_folder_that_cannot_be_read_is_named(tmp_path, pictures, monkeypatch):
    """If it were skipped without a message, its class would be missing silently."""
    pictures("cats/a.jpg")
    locked, scan = pictures("dogs/b.jpg").parent, os.scandir

    def scandir(path):
        if os.fspath(path) == str(locked):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    config = PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out")
    assert refusal(config).startswith(f"{locked}: it cannot be read (Permission denied)")
    summary = dataclasses.replace(config, on_bad="skip").run()
    assert (summary["classes"], summary["skipped"]) == (
        ["cats"],
        [f"{locked}: it cannot be read (Permission denied)"],
    )


def test_a_linked_folder_is_a_class_and_a_circle_is_refused(tmp_path, pictures):
    pictures("cats/a.jpg")
    elsewhere = pictures("../elsewhere/b.jpg").resolve().parent
    (tmp_path / "pictures" / "dogs").symlink_to(elsewhere)
    config = PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out")
    assert config.run()["classes"] == ["cats", "dogs"]
    shutil.rmtree(tmp_path / "out")
    (elsewhere / "again").symlink_to(tmp_path / "pictures")
    assert f"{elsewhere.name}/again: it is a link" in refusal(config).replace("dogs", elsewhere.name)


@pytest.mark.parametrize("first", ["link", "folder"])
def test_of_a_folder_and_its_link_the_link_is_to_be_removed(tmp_path, first):
    """Whichever of them the file system lists first, the message names the link: the folder holds the pictures."""
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    walked = {}
    _refuse_duplicate_folder(tmp_path / first, walked)
    with pytest.raises(Refused, match=re.escape(f"{link}: it is a link to a folder that is read as {folder} too")):
        _refuse_duplicate_folder(link if first == "folder" else folder, walked)


def test_a_key_stays_its_pictures_own_when_others_are_added(tmp_path, pictures, cpu):
    """A run chooses its held-out split by keys, and remembers them."""
    keys = {}
    for out, name in (("one", "cats/b.jpg"), ("two", "cats/a.jpg")):
        pictures(name)
        PrepareFolder(images=tmp_path / "pictures", out=tmp_path / out).run()
        dataset = Shards(shards=tmp_path / out, size=64).open(cpu)
        sources = [json.loads(dataset._bytes._text_member("json", i))["source"] for i in range(dataset.count)]
        keys[out] = dict(zip(sources, dataset.keys, strict=True))
    assert len(keys["two"]) == 2 and keys["two"]["cats/b.jpg"] == keys["one"]["cats/b.jpg"] != keys["two"]["cats/a.jpg"]


def test_small_pictures_are_not_enlarged(tmp_path, pictures, cpu, plan_for):
    pictures("a.jpg")
    PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out", size=300).run()
    dataset, _ = images_of(tmp_path / "out", cpu, plan_for, 1)
    assert (dataset.columns["height"][0], dataset.columns["width"][0]) == (80, 100)


def test_names_that_are_not_utf8(tmp_path, pictures, cpu, plan_for):
    try:
        (tmp_path / "pictures" / os.fsdecode(b"caf\xe9")).mkdir(parents=True)
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    pictures(os.fsdecode(b"caf\xe9/\xff.jpg"))
    pictures("tea/a.jpg")
    PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out").run()
    _, batch = images_of(tmp_path / "out", cpu, plan_for, 2)
    assert batch.captions == ["a photo of a caf\ufffd", "a photo of a tea"]
    pictures(os.fsdecode(b"caf\xe9/\xfe.jpg"))  # both file names decode to the same text
    assert PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out3").run()["images"] == 3
    keys = Shards(shards=tmp_path / "out3", size=64).open(cpu).keys
    assert len(set(keys)) == 3
    pictures(os.fsdecode(b"caf\xe8/a.jpg"))
    config = PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out2")
    assert "two folders are both read as 'caf\ufffd'" in refusal(config)


def test_limit(tmp_path, pictures):
    for number in range(5):
        pictures(f"{number}.jpg")
    assert PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out", limit=3).run()["images"] == 3


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0},
        {"quality": 0},
        {"quality": 90},
        {"image_format": "npy"},
        {"limit": -1},
        {"threads": 0},
        {"per_shard": 0},
    ],
)
def test_nonsense_options_are_refused(tmp_path, options):
    with pytest.raises(Refused, match=next(iter(options))):
        PrepareFolder(images=tmp_path, out=tmp_path / "out", **options)


def test_class_captions():
    assert class_caption("a photo of a {}", "ankle boot") == "a photo of an ankle boot"
    assert class_caption("a photo of a {}", "animals/red_panda") == "a photo of a red panda"
    assert class_caption("{}, studio light", "t-shirt") == "t-shirt, studio light"


TEXT_FORM = "3\nSmiling Male\n0.jpg  1 -1\n1.jpg -1 -1\n2.jpg  1  1\n"
CSV_FORM = "image_id,Smiling,Male\n0.jpg,1,-1\n1.jpg,-1,-1\n2.jpg,1,1\n"


@pytest.mark.parametrize(
    "name, text", [("list.txt", TEXT_FORM), ("list.csv", CSV_FORM), ("LIST.CSV", CSV_FORM.replace(",", ", "))]
)
def test_celeba(tmp_path, pictures, cpu, plan_for, name, text):
    for number in range(3):
        pictures(f"{number}.jpg")
    (tmp_path / name).write_text(text)
    config = {"images": tmp_path / "pictures", "attributes": tmp_path / name}
    summary = PrepareCeleba(**config, out=tmp_path / "out", size=64).run()
    assert summary["attributes"] == ["Smiling", "Male"]
    _, batch = images_of(tmp_path / "out", cpu, plan_for, 3)
    assert batch.attributes_NK.tolist() == [[1, 0], [0, 0], [1, 1]]
    (tmp_path / "split.txt").write_text("0.jpg 0\n1.jpg 2\n2.jpg 0\n")
    split = PrepareCeleba(**config, out=tmp_path / "train", partition=tmp_path / "split.txt", split="train")
    assert split.run()["images"] == 2
    with pytest.raises(Refused, match="--partition"):
        PrepareCeleba(**config, out=tmp_path / "valid", split="valid")


@pytest.mark.parametrize("name, text", [("list.txt", TEXT_FORM), ("list.csv", CSV_FORM)])
def test_a_line_of_celeba_is_named_by_its_number(tmp_path, pictures, name, text):
    pictures("0.jpg")
    (tmp_path / name).write_text(text.replace("1.jpg", "one dot jpg"))
    number = next(i for i, line in enumerate(text.splitlines(), 1) if "1.jpg" in line)
    config = PrepareCeleba(images=tmp_path / "pictures", attributes=tmp_path / name, out=tmp_path / "out")
    if name == "list.csv":
        (tmp_path / name).write_text(text.replace("1.jpg,-1", "1.jpg,seven"))
    assert f"line {number} is not" in refusal(config)


def test_a_celeba_csv_with_an_open_quote_is_refused(tmp_path, pictures):
    (tmp_path / "list.csv").write_text('name,A\n"0.jpg,1\n' + "x" * 200_000)
    config = PrepareCeleba(images=pictures("0.jpg").parent, attributes=tmp_path / "list.csv", out=tmp_path / "out")
    assert "list.csv: " in refusal(config)


@pytest.mark.parametrize(
    "text", ["", "3\n", "2\nA B\n0.jpg 1\n", "2\nA B\n0.jpg 1 7\n", "1\nA\n../0.jpg 1\n", "\x00\n\x00"]
)
def test_celeba_lists_that_are_not(tmp_path, pictures, text):
    pictures("0.jpg")
    (tmp_path / "list.txt").write_text(text)
    message = refusal(
        PrepareCeleba(images=tmp_path / "pictures", attributes=tmp_path / "list.txt", out=tmp_path / "out")
    )
    assert "list.txt" in message


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("list.csv", CSV_FORM.partition("\n")[2], "line 1 has '1' where an attribute's name should be; begin "),
        ("list.txt", TEXT_FORM.partition("Male\n")[2], "line 1 has '1' where an attribute's name should be; begin "),
        ("list.txt", TEXT_FORM.replace("Smiling Male\n", ""), "line 2 has '1' where"),
        ("list.csv", CSV_FORM.replace("Smiling", ""), "line 1 has '' where"),
        ("list.csv", "image_id\n0.jpg\n", "line 1 names no attribute; separate its columns by commas"),
        (
            "list.csv",
            CSV_FORM.replace(",", ";"),
            "line 1 names no attribute; separate its columns by commas",
        ),
        ("list.txt", TEXT_FORM.replace("Smiling Male", ""), "line 2 names no attribute; write them there"),
        ("list.csv", CSV_FORM.replace("Male", "Smiling"), "line 1 names 'Smiling' twice"),
        ("list.txt", TEXT_FORM.replace("Male", "Smiling"), "line 2 names 'Smiling' twice"),
    ],
)
def test_a_celeba_list_names_its_attributes(tmp_path, pictures, name, text, said):
    """If a list had no header, its first picture would be taken for one, and attributes would be called -1 and 1."""
    for number in range(3):
        pictures(f"{number}.jpg")
    (tmp_path / name).write_text(text)
    config = PrepareCeleba(images=tmp_path / "pictures", attributes=tmp_path / name, out=tmp_path / "out")
    assert refusal(config).startswith(f"{tmp_path / name}: {said}")


def test_a_celeba_list_is_cut_at_line_ends_only(faces, tmp_path):
    (tmp_path / "pictures" / "0.jpg").rename(tmp_path / "pictures" / "0\u2028.jpg")
    for path in (faces["attributes"], tmp_path / "split.csv"):
        text = path.read_text().replace(" ", ",").replace(",,", ",").replace("3\nSmiling", "image_id,Smiling")
        path.with_suffix(".csv").write_text(text.replace("0.jpg", "0\u2028.jpg"), encoding="utf-8")
    config = PrepareCeleba(**(faces | {"attributes": tmp_path / "list.csv"}))
    assert config.run()["images"] == 3


@pytest.fixture
def faces(tmp_path, pictures):
    """Three pictures of CelebA, its list and its partition, as flags."""
    for number in range(3):
        pictures(f"{number}.jpg")
    (tmp_path / "list.txt").write_text(TEXT_FORM)
    (tmp_path / "split.csv").write_text("image_id,partition\n0.jpg,0\n1.jpg, 2\n2.jpg,0\n")
    return {"images": tmp_path / "pictures", "attributes": tmp_path / "list.txt", "out": tmp_path / "out"}


@pytest.mark.parametrize("text", [TEXT_FORM.rpartition("2.jpg")[0], TEXT_FORM + "3.jpg 1 1\n"])
def test_a_celeba_list_has_as_many_lines_as_it_says(faces, text):
    faces["attributes"].write_text(text)
    message = refusal(PrepareCeleba(**faces))
    assert message.startswith(f"{faces['attributes']}: it says 3 images but lists {text.count('.jpg')}; ")


def test_a_celeba_list_names_a_file_once(faces):
    faces["attributes"].write_text(TEXT_FORM.replace("2.jpg", "1.jpg"))
    assert "list.txt: line 5 names '1.jpg' a second time" in refusal(PrepareCeleba(**faces))


def test_a_celeba_partition_needs_a_split(faces, tmp_path):
    """Without one, the test images would be trained on."""
    with pytest.raises(Refused, match="add --split train"):
        PrepareCeleba(**faces, partition=tmp_path / "split.csv")
    train = PrepareCeleba(**faces, partition=tmp_path / "split.csv", split="train")
    assert train.run()["images"] == 2


@pytest.mark.parametrize(
    "text, said",
    [
        (TEXT_FORM, "line 1 is not a file name and 0, 1 or 2"),
        (CSV_FORM, "line 1 is not a file name and 0, 1 or 2"),
        ("image_id,Smiling\n0.jpg,1\n1.jpg,-1\n", "line 1 is not a file name and 0, 1 or 2"),
        ("0.jpg 0\n1.jpg 3\n2.jpg 0\n", "line 2 is not a file name and 0, 1 or 2"),
        ("0.jpg 0\n", "no line for 2 pictures of {attributes}, the first '1.jpg'"),
        ("0.jpg 0\n1.jpg 0\n2.jpg 2\n", "no picture of {attributes} is in valid"),
    ],
)
def test_celeba_partitions_that_are_not(faces, tmp_path, text, said):
    path = tmp_path / "split.csv"
    path.write_text(text)
    message = refusal(PrepareCeleba(**faces, partition=path, split="valid"))
    assert message.startswith(f"{path}: ") and said.format(**faces) in message


@pytest.mark.parametrize("on_bad", ["refuse", "skip"])
def test_celeba_beside_another_folder_of_faces(faces, tmp_path, on_bad):
    """If only the number counted, 00000.jpg of another set would get the attributes of 0.jpg."""
    for number in range(3):
        (tmp_path / "pictures" / f"{number}.jpg").rename(tmp_path / "pictures" / f"{number:05d}.jpg")
    message = refusal(PrepareCeleba(**faces, on_bad=on_bad))
    assert message.startswith(f"images {faces['images']}: it holds '00000.jpg' and 2 more, and not one picture that ")
    assert f"{faces['attributes']} names, the first '0.jpg'; give the folder" in message
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "it holds nothing, and not one" in refusal(PrepareCeleba(**(faces | {"images": empty}), on_bad=on_bad))


@pytest.mark.parametrize("on_bad", ["refuse", "skip"])
def test_celeba_in_a_doubled_folder(faces, tmp_path, on_bad):
    folder = tmp_path / "pictures"
    folder.rename(tmp_path / "moved")
    folder.mkdir()
    inner = (tmp_path / "moved").rename(folder / "pictures")
    message = refusal(PrepareCeleba(**faces, on_bad=on_bad))
    assert message.startswith(f"images {folder}: ") and message.endswith(f"pass --images {inner}")


def test_some_faces_may_be_missing(faces):
    (faces["images"] / "0.jpg").unlink()
    assert "0.jpg: it cannot be read" in refusal(PrepareCeleba(**faces))
    assert PrepareCeleba(**faces, on_bad="skip").run()["images"] == 2
