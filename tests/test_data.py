"""Every source of data gives the same arrays, damaged ones are refused by name, and batches hold the right images."""
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import make_arrays
from PIL import Image

from gst_ext import files
import train

CPU = torch.device("cpu")


def put(arrays, val_split=0, train_images=0, test_images=0, label_noise=0.0):
    options = dict(val_split=val_split, train_images=train_images, test_images=test_images, label_noise=label_noise)
    return train.put_on_device(arrays, CPU, types.SimpleNamespace(**options, augment=False))


def check_form(data, k):
    for split in ("train", "test"):
        x, y = data[f"{split}_x"], data[f"{split}_y"]
        assert x.dtype == np.uint8 and x.shape == (len(y), 32, 32, 3)
        assert y.dtype == np.int64 and set(y.tolist()) == set(range(k))
    assert len(data["classes"]) == k


# Digits

def test_digits_are_1000_and_797_images_of_all_ten_classes_without_network(monkeypatch):
    import socket
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("digits went to the network"))
    data, again = train.load_data("digits"), train.load_data("digits")
    check_form(data, 10)
    assert (len(data["train_x"]), len(data["test_x"])) == (1000, 797)
    assert all(np.array_equal(data[name], again[name]) for name in data)
    assert (data["train_x"] == data["train_x"][..., :1]).all(), "three equal channels"


def test_digits_hold_every_image_of_scikit_learn_once():
    import sklearn.datasets
    source, data = sklearn.datasets.load_digits(), train.load_data("digits")
    labels = np.concatenate([data["train_y"], data["test_y"]])
    assert np.array_equal(np.bincount(labels), np.bincount(source.target))
    images = np.concatenate([data["train_x"], data["test_x"]])[..., 0] / 255 * 16
    coarse = images.reshape(-1, 8, 4, 8, 4).mean((2, 4))  # back to 8x8, smoothed
    nearest = np.argsort(((coarse[:50, None] - source.images[None]) ** 2).sum((2, 3)), 1)[:, 0]
    assert (source.target[nearest] == labels[:50]).all()


# .npz files

def test_npz_round_trip(tmp_path):
    arrays = make_arrays(20, 12)
    np.savez(tmp_path / "a.npz", **arrays)
    data = train.load_data(str(tmp_path / "a.npz"))
    check_form(data, 4)
    assert set(data) == set(arrays) and all(np.array_equal(data[name], arrays[name]) for name in arrays)


def bad(**changes):
    """Arrays with some replaced by what a function makes of them; None takes one away."""
    arrays = make_arrays(20, 12)
    for name, change in changes.items():
        value = arrays.pop(name)
        if change is not None:
            arrays[name] = change(value)
    return arrays


@pytest.mark.parametrize("changes, named", [
    (dict(train_y=None), "train_y"),
    (dict(classes=None), "classes"),
    (dict(train_x=lambda x: x / np.float32(255)), "train_x"),
    (dict(test_x=lambda x: x.astype(np.int64)), "test_x"),
    (dict(test_x=lambda x: x[..., 0]), "test_x"),
    (dict(train_x=lambda x: x.transpose(0, 3, 1, 2)), "train_x"),
    (dict(train_x=lambda x: x[:, :28, :28]), "train_x"),
    (dict(test_x=lambda x: x[..., :1]), "test_x"),
    (dict(train_x=lambda x: x[0, 0, 0, 0]), "train_x"),
    (dict(train_x=lambda x: x[:0], train_y=lambda y: y[:0]), "train"),
    (dict(train_y=lambda y: y + 1), "train_y"),
    (dict(test_y=lambda y: y - 1), "test_y"),
    (dict(test_y=lambda y: y[:-1]), "test_y"),
    (dict(train_y=lambda y: y[:, None]), "train_y"),
    (dict(train_y=lambda y: y + 0.5), "train_y"),
    (dict(train_y=lambda y: y.astype(object)), "pickle"),
    (dict(classes=lambda c: c.astype(object)), "pickle"),
    (dict(train_y=lambda y: y * 0, test_y=lambda y: y * 0, classes=lambda c: c[:1]), "classes"),
    (dict(classes=lambda c: np.array("one")), "classes"),
    (dict(test_x=lambda x: np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))), "size"),
])
def test_bad_arrays_are_refused_by_name(tmp_path, changes, named):
    path = tmp_path / "broken.npz"
    np.savez(path, **bad(**changes))
    with pytest.raises(files.UserError) as error:
        train.load_data(str(path))
    assert str(path) in str(error.value) and named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ("truncated", "flipped", "text", "empty", "npy", "missing", "folder"))
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    path = tmp_path / "broken.npz"
    np.savez(path, **make_arrays(20, 12))
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "npy":
        with open(path, "wb") as file:
            np.save(file, np.arange(5))
    elif damage != "missing":
        content[len(content) // 2] ^= 255
        path.write_bytes({"truncated": content[:len(content) // 2], "flipped": content, "text": b"hello\n",
                          "empty": b""}[damage])
    with pytest.raises(files.UserError) as error:
        train.load_data(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_data_set_is_refused_by_name():
    with pytest.raises(files.UserError, match="cifra10"):
        train.load_data("cifra10")


# Image folders

def write_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_folder(root, arrays, names=("cat", "dog", "emu", "fox")):
    for split in ("train", "test"):
        for i, (x, y) in enumerate(zip(arrays[f"{split}_x"], arrays[f"{split}_y"])):
            write_image(root / split / names[y] / f"{i:03}.png", x)
    return root


def test_image_folder_gives_the_pixels_and_the_classes_in_alphabetical_order(tmp_path):
    arrays = make_arrays(20, 12)
    data = train.load_data(str(make_folder(tmp_path / "animals", arrays)))
    check_form(data, 4)
    assert data["classes"].tolist() == ["cat", "dog", "emu", "fox"]
    for split in ("train", "test"):
        order = np.argsort(arrays[f"{split}_y"], kind="stable")
        assert np.array_equal(data[f"{split}_x"], arrays[f"{split}_x"][order])
        assert np.array_equal(data[f"{split}_y"], arrays[f"{split}_y"][order])


def test_image_folder_converts_grey_and_large_images(tmp_path):
    folder = make_folder(tmp_path / "animals", make_arrays(20, 12))
    write_image(folder / "train" / "cat" / "zz.png", np.full((50, 70), 77, np.uint8))
    data = train.load_data(str(folder))
    assert (data["train_x"][data["train_y"] == 0][-1] == 77).all()


def folder_with(root, name, image, **more):
    """A folder of images whose last one in class fox is `image`, saved under that name; the path of that."""
    path = make_folder(root / "animals", make_arrays(20, 12)) / "train" / "fox" / name
    image.save(path, **more)
    return path


def read_last(path):
    return train.load_data(str(path.parent.parent.parent))["train_x"][-1]


RAMP = np.linspace(0, 65535, 1024).round().astype(np.uint16).reshape(32, 32)


@pytest.mark.parametrize("ending", ("png", "tif", "pgm"))
def test_16_bits_are_scaled_to_8(tmp_path, ending):
    path = folder_with(tmp_path, f"zz.{ending}", Image.fromarray(RAMP))
    assert np.array_equal(read_last(path), np.repeat(np.rint(RAMP / 257).astype(np.uint8)[..., None], 3, 2))


@pytest.mark.parametrize("name, pixels, more", [
    ("zz.tif", RAMP.astype(np.int32), {}), ("zz.tif", RAMP.astype(np.float32), {}),
    ("zz.tif", RAMP, {"tiffinfo": {262: 0}}),  # white is 0
    ("zz.png", RAMP, {"transparency": 0})])
def test_pixels_without_a_defined_range_are_refused_by_name(tmp_path, name, pixels, more):
    path = folder_with(tmp_path, name, Image.fromarray(pixels), **more)
    with pytest.raises(train.UserError) as error:
        read_last(path)
    assert str(path) in str(error.value) and "8-bit PNG" in str(error.value) and "\n" not in str(error.value)


def square(mode):
    """A black square on transparency, in a mode of Pillow's."""
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[8:24, 8:24, 3] = 255
    image = Image.fromarray(pixels)
    return image.quantize(4) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("mode", ("P", "LA", "RGBA"))
def test_what_is_transparent_lies_on_white(tmp_path, mode):
    expected = np.full((32, 32, 3), 255, np.uint8)
    expected[8:24, 8:24] = 0
    assert np.array_equal(read_last(folder_with(tmp_path, "zz.png", square(mode))), expected)


def test_a_half_transparent_pixel_is_half_white_and_an_opaque_one_is_itself(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4)).astype(np.uint8)
    pixels[..., 3] = 255
    pixels[0, 0] = 40, 80, 120, 51  # a fifth
    expected = pixels[..., :3].copy()
    expected[0, 0] = 212, 220, 228
    assert np.array_equal(read_last(folder_with(tmp_path, "zz.png", Image.fromarray(pixels))), expected)


@pytest.mark.parametrize("ending", ("png", "tif"))
def test_images_are_turned_as_their_exif_data_say(tmp_path, ending):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[0, :5], pixels[1:, 0] = 200, 90
    seen = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.transpose(1, 0, 2),
            6: np.rot90(pixels, -1), 7: np.rot90(pixels, 2).transpose(1, 0, 2), 8: np.rot90(pixels)}
    for orientation, expected in seen.items():
        exif = Image.Exif()
        exif[files.EXIF_ORIENTATION] = orientation
        path = folder_with(tmp_path / str(orientation), f"zz.{ending}", Image.fromarray(pixels), exif=exif)
        assert np.array_equal(read_last(path), expected), orientation


def test_what_was_converted_is_said_in_one_line_once(tmp_path, capsys, monkeypatch):
    path = folder_with(tmp_path, "zz.png", Image.fromarray(RAMP))
    folder = path.parent.parent.parent
    square("RGBA").save(folder / "test" / "cat" / "a.png")
    square("P").save(folder / "test" / "cat" / "b.png")
    (folder / "train" / "labels.csv").write_text("")
    monkeypatch.setattr(files, "SAID", set())
    for _ in range(2):
        read_last(path)
    line, = capsys.readouterr().err.splitlines()
    assert str(folder) in line and "1 scaled from 16 bits" in line and "2 with transparency" in line
    assert "1 beside the class folders" in line and "EXIF" not in line


def test_plain_images_need_no_word(tmp_path, capsys):
    train.load_data(str(make_folder(tmp_path / "animals", make_arrays(20, 12))))
    assert capsys.readouterr().err == ""


def test_hidden_folders_and_files_are_no_classes_and_no_images(tmp_path):
    folder = make_folder(tmp_path / "animals", make_arrays(20, 12))
    plain = train.load_data(str(folder))
    for split in ("train", "test"):
        write_image(folder / split / ".ipynb_checkpoints" / "a.png", np.zeros((32, 32, 3), np.uint8))
        (folder / split / ".cache").mkdir()
        (folder / split / "cat" / ".ipynb_checkpoints").mkdir()
        (folder / split / "cat" / ".DS_Store").write_text("")
    data = train.load_data(str(folder))
    assert all(np.array_equal(data[name], plain[name]) for name in plain)


@pytest.mark.parametrize("split", ("train", "test"))
@pytest.mark.parametrize("how", ("empty", "hidden only", "missing"))
def test_a_class_without_images_is_refused_by_name(tmp_path, split, how):
    folder = make_folder(tmp_path / "animals", make_arrays(20, 12))
    (folder / split / "dog").rename(tmp_path / "elsewhere")
    (folder / "train" / "dog").mkdir(exist_ok=True)
    if how != "missing":
        (folder / split / "dog").mkdir(exist_ok=True)
    if how == "hidden only":
        write_image(folder / split / "dog" / ".thumbnail.png", np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(train.UserError) as error:
        train.load_data(str(folder))
    assert str(folder / split / "dog") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage, named", [("not an image", "001.png"), ("unknown class", "gnu"), ("no test", "test"),
                                           ("no classes", "class")])
def test_bad_image_folders_are_refused_by_name(tmp_path, damage, named):
    folder = tmp_path / "animals"
    if damage == "no classes":
        folder.mkdir()
    else:
        make_folder(folder, make_arrays(20, 12))
    if damage == "not an image":
        (folder / "train" / "dog" / "001.png").write_text("hello")
    elif damage == "unknown class":
        write_image(folder / "test" / "gnu" / "a.png", np.zeros((32, 32, 3), np.uint8))
    elif damage == "no test":
        (folder / "test").rename(tmp_path / "elsewhere")
    with pytest.raises(files.UserError) as error:
        train.load_data(str(folder))
    assert named in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


# CIFAR by torchvision

@pytest.mark.parametrize("name", ("cifar10", "cifar100"))
def test_cifar_is_downloaded_once_and_then_read_from_its_cache(tmp_path, monkeypatch, name):
    arrays, calls = make_arrays(20, 12), []

    def fake(root, train, download):
        calls.append((root, train, download))
        split = "train" if train else "test"
        return types.SimpleNamespace(data=arrays[f"{split}_x"], targets=arrays[f"{split}_y"].tolist(),
                                     classes=arrays["classes"].tolist())

    monkeypatch.setattr(torchvision.datasets, name.upper(), fake)
    first = train.load_data(name, str(tmp_path / "data"))
    assert sorted(split for _, split, download in calls if download) == [False, True]
    assert (tmp_path / "data" / f"{name}.npz").exists()
    monkeypatch.setattr(torchvision.datasets, name.upper(), lambda *_, **__: pytest.fail("downloaded again"))
    second = train.load_data(name, str(tmp_path / "data"))
    for data in (first, second):
        check_form(data, 4)
        assert all(np.array_equal(data[key], arrays[key]) for key in arrays)


def test_a_failed_download_names_the_three_ways_in_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no route to host\nand more")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    with pytest.raises(files.UserError) as error:
        train.load_data("cifar10", str(tmp_path))
    message = str(error.value)
    assert all(way in message for way in ("cifar10.npz", "cifar-10-python.tar.gz", "--dataset digits"))
    assert "no route to host" in message and "\n" not in message
    assert not list(tmp_path.glob("*.npz*"))


# On the device

def test_normalised_training_images_have_mean_0_and_deviation_1_in_every_channel():
    data = train.put_on_device(make_arrays(60, 12), CPU)
    x = train.normalise(data["train"][0], data)
    assert x.shape == (60, 3, 32, 32) and x.dtype == torch.float32
    x = x.double()
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)
    pixels = data["test"][0].double()
    expected = (pixels[3, 5, 7, 1] - data["train"][0][..., 1].double().mean()) / data["train"][0][..., 1].double().std()
    assert train.normalise(data["test"][0], data)[3, 1, 5, 7].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_constant_channel_is_refused():
    arrays = make_arrays(20, 12)
    for value in (0, 77, 255):
        arrays["train_x"][..., 1] = value
        with pytest.raises(files.UserError, match="constant"):
            train.put_on_device(arrays, CPU)


def test_validation_split_is_disjoint_and_drawn_from_the_training_set():
    arrays = make_arrays(60, 12)
    arrays["train_x"][:, 0, 0, 0] = np.arange(60)  # each image's own name
    arrays["train_y"] = np.arange(60) % 4
    data = put(arrays, 13)
    names = {split: data[split][0][:, 0, 0, 0].tolist() for split in ("train", "val")}
    assert len(names["val"]) == 13 and sorted(names["train"] + names["val"]) == list(range(60))
    for split, members in names.items():
        assert data[split][1].tolist() == [i % 4 for i in members]
    assert len(data["test"][0]) == 12
    kept = arrays["train_x"][sorted(names["train"])].astype(np.float64)
    assert np.allclose(data["mean"], kept.mean((0, 1, 2))) and np.allclose(data["std"], kept.std((0, 1, 2)))


def test_validation_split_is_the_same_whatever_the_seed():
    arrays, splits = make_arrays(60, 12), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        splits.append(put(arrays, 13)["val"])
    assert torch.equal(splits[0][0], splits[1][0])
    assert "val" not in put(arrays, 0)


@pytest.mark.parametrize("n", (60, 61))
def test_a_validation_split_that_leaves_nothing_is_refused(n):
    with pytest.raises(files.UserError, match="val-split"):
        put(make_arrays(60, 12), n)


# Augmentation

def test_crops_and_flips_cover_every_offset_and_repeat_with_their_generator():
    offsets, flips = train.draw_crops(2000, torch.Generator().manual_seed(1))
    assert offsets.shape == (2, 2000) and set(offsets.flatten().tolist()) == set(range(9))
    assert 900 < int(flips.sum()) < 1100
    assert abs(np.corrcoef(offsets.numpy())[0, 1]) < 0.1, "rows and columns move independently"
    again = train.draw_crops(2000, torch.Generator().manual_seed(1))
    assert torch.equal(offsets, again[0]) and torch.equal(flips, again[1])


@pytest.mark.parametrize("height, width", [(32, 32), (36, 40)])
def test_crop_and_flip_equals_a_crop_by_hand(height, width):
    x = torch.randint(1, 256, (7, height, width, 3), dtype=torch.uint8)
    padded = F.pad(x, (0, 0, 4, 4, 4, 4))
    index = torch.tensor([6, 0, 3, 3, 1, 2, 5, 4])
    offsets = torch.tensor([[0, 8, 4, 3, 0, 8, 4, 1], [8, 0, 4, 5, 0, 8, 4, 7]])
    flips = torch.tensor([False, True, False, True, True, False, True, False])
    out = train.crop_and_flip(padded, index, offsets, flips)
    for j, i in enumerate(index.tolist()):
        by_hand = np.pad(x[i].numpy(), ((4, 4), (4, 4), (0, 0)))
        by_hand = by_hand[offsets[0, j]:offsets[0, j] + height, offsets[1, j]:offsets[1, j] + width]
        assert np.array_equal(out[j].numpy(), by_hand[:, ::-1] if flips[j] else by_hand)
    assert torch.equal(out[2], x[3]), "offset 4 without flip is the image itself"


def test_fewer_images_and_noised_labels_are_the_same_for_every_run():
    arrays = make_arrays(60, 40)
    arrays["train_x"][:, 0, 0, 0] = np.arange(60)  # so that each image can be told
    whole = train.put_on_device(arrays, CPU)
    few = put(arrays, 10, 20, 15, 0.5)
    names = {split: set(few[split][0][:, 0, 0, 0].tolist()) for split in ("train", "val")}
    assert [len(few[split][1]) for split in ("train", "val", "test")] == [20, 10, 15]
    assert not names["train"] & names["val"]
    assert names["val"] == set(put(arrays, 10)["val"][0][:, 0, 0, 0].tolist())
    true = whole["train"][1][few["train"][0][:, 0, 0, 0].long()]
    changed = (few["train"][1] != true).sum()
    assert 0 < changed <= 10, "half of the labels are drawn anew, and some stay as they were by chance"
    again = put(arrays, 10, 20, 15, 0.5)
    assert torch.equal(few["train"][1], again["train"][1]) and torch.equal(few["test"][0], again["test"][0])
    clean = put(arrays, 10, 20, 15)
    assert torch.equal(clean["train"][1], true) and torch.equal(clean["val"][1], few["val"][1])


def test_all_labels_noised_are_uniform():
    arrays = make_arrays(6000, 4, classes=3)
    counts = torch.bincount(put(arrays, label_noise=1.0)["train"][1], minlength=3)
    assert counts.sum() == 6000 and (counts - 2000).abs().max() < 5 * (6000 * 2 / 9) ** 0.5


@pytest.mark.parametrize("options", ({"train_images": 61}, {"val_split": 30, "train_images": 31}, {"test_images": 41}))
def test_more_images_than_there_are_is_an_error(options):
    with pytest.raises(files.UserError, match="give fewer"):
        put(make_arrays(60, 40), **options)
