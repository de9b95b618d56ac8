"""Sources of data give the same arrays, faults are named, and batches hold what they should."""
import concurrent.futures
import pathlib
import re
import sys
import time
import types
import zlib

import numpy as np
import pytest
import scipy.io
import sklearn.datasets
import torch
import torchvision
from conftest import make_arrays
from PIL import Image

from gst_ext import datasets, errors

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "data.md"


def pixels(*shape):
    return np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)


RGB = pixels(32, 32, 3)
RAMP = np.linspace(0, 65535, 1024).round().astype(np.uint16).reshape(32, 32)


def load(name, *more):
    return datasets.load_dataset(str(name), *more)


def refusal(name, *more):
    """Returns the one line with which a data set is refused."""
    with pytest.raises(errors.UserError, match=r"\A.*\Z") as error:
        load(name, *more)
    return str(error.value)


@pytest.fixture(autouse=True)
def warned(monkeypatch, capsys):
    """Returns a function that gives the lines warned of since its last call."""
    monkeypatch.setattr(errors, "WARNED", set())
    return lambda: capsys.readouterr().err.splitlines()


def small_arrays(val=True):
    arrays = make_arrays(20, 12)
    return arrays | {"val_x": pixels(8, 32, 32, 3), "val_y": np.arange(8) % 4} if val else arrays


def check_form(data, k, **sizes):
    for split, n in sizes.items():
        x, y = data[f"{split}_x"], data[f"{split}_y"]
        assert x.dtype == np.uint8 and x.shape == (n, 32, 32, 3)
        assert y.dtype == np.int64 and len(y) == n and set(y) == set(range(k))
    assert len(data["classes"]) == k and len(data) == 1 + 2 * len(sizes)


def assert_equal(data, expected):
    assert all(np.array_equal(data[name], expected[name]) for name in data | expected)


def test_digits_are_those_of_scikit_learn(warned):
    data, source = load("digits"), sklearn.datasets.load_digits()
    check_form(data, 10, train=1000, test=797)
    assert_equal(data, load("digits"))
    assert warned() == []
    x, y = (np.concatenate([data[f"train_{part}"], data[f"test_{part}"]]) for part in "xy")
    assert (x == x[..., :1]).all() and np.array_equal(np.bincount(y), np.bincount(source.target))
    coarse = x[:50, ..., 0].reshape(-1, 8, 4, 8, 4).mean((2, 4)) * 16 / 255  # 8x8 again, smoothed
    nearest = ((coarse[:, None] - source.images) ** 2).sum((2, 3)).argmin(1)
    assert np.array_equal(source.target[nearest], y[:50])


# .npz files

@pytest.mark.parametrize("more", ({}, {"val": 8}))
def test_npz_round_trip(tmp_path, more, warned):
    arrays = small_arrays(bool(more))
    np.savez(tmp_path / "a.npz", **arrays)
    data = load(tmp_path / "a.npz")
    check_form(data, 4, train=20, test=12, **more)
    assert_equal(data, arrays)
    assert warned() == []
    sums = {name: zlib.crc32(data[name].tobytes()) for name in data if name != "classes"}
    assert datasets.dataset_info(data) == {
        "train": 20, "test": 12, **more, "classes": 4, "image": [32, 32, 3], "crc32": sums}


def cast(offset, scale):
    """Returns a function that casts rescaled images to bytes, by which their shades are lost."""
    return lambda x: ((x - float(offset)) / scale).astype(np.int64).astype(np.uint8)


@pytest.mark.parametrize("name, change, message", [
    ("train_y", None, "lacks train_y and holds classes"), ("val_y", None, "lacks val_y"),
    ("train_x", lambda x: x / np.float32(255), "float32"),
    ("test_x", lambda x: x[..., 0], "(12, 32, 32)"), ("val_x", lambda x: x[..., :1], "32, 1)"),
    ("train_x", lambda x: x[:, :28, :28], "at least 32x32"), ("classes", np.size, "two names"),
    ("train_x", lambda x: x[:0], "0 images"), ("val_x", lambda x: x.repeat(2, 1), "in the size"),
    ("train_y", lambda y: y + 1, "from 1 to 4"), ("test_y", lambda y: y - 1, "from -1 to 2"),
    ("val_y", lambda y: y[:-1], "each of 8"), ("train_y", lambda y: y[:, None], "(20, 1)"),
    ("test_y", lambda y: y + 0.5, "float64"), ("train_y", lambda y: y.astype(object), "pickle"),
    ("train_x", cast(0, 255), "only the pixels 0, 1;"), ("test_x", cast(0, 256), "pixels 0;"),
    ("val_x", cast(127.5, 127.5), "0, 1, 255;"), ("test_x", cast(120, 50), "0, 2, 254, 255;")])
def test_bad_arrays_are_refused_by_name(tmp_path, name, change, message):
    arrays = small_arrays()
    arrays["train_x"][0, 0, 0], arrays["test_x"][0, 0, 0] = 255, 255
    value = arrays.pop(name)
    if change:
        arrays[name] = change(value)
    np.savez(tmp_path / "a.npz", **arrays)
    line = refusal(tmp_path / "a.npz")
    assert message in line and str(tmp_path / "a.npz") in line


def test_other_files_are_refused_by_their_kind(tmp_path):
    for ending in (".npy", ".mat", ".parquet", ".NPZ", ""):
        (tmp_path / f"a{ending}").touch()
        message = f"a{ending}: the file's name ends in {ending or 'nothing'} and not in .npz"
        assert message in refusal(tmp_path / f"a{ending}")
    for content in (b"", b"hello\n"):
        (tmp_path / "a.npz").write_bytes(content)
        assert "a.npz cannot be read" in refusal(tmp_path / "a.npz")
    assert "cifra10: no such file" in refusal("cifra10")


def test_doubts_about_arrays_are_one_line_each(warned):
    arrays = small_arrays() | {"valid_x": np.zeros(3)}
    train_x, test_x, val_x = (arrays[f"{split}_x"] for split in ("train", "test", "val"))
    test_x //= 4
    test_x[:, 0, 0], test_x[1] = 63, test_x[3]
    train_x[7], train_x[9], train_x[0], val_x[1] = test_x[3], test_x[4], val_x[0], test_x[6]
    val_x[2] = train_x[5]
    val_x[2, 0, 0, 0] ^= 1  # nearly equal
    arrays["train_y"] %= 2
    datasets.check_arrays("x", arrays | {"train_x": np.asfortranarray(train_x)})
    datasets.check_training_classes(np.array([0, 5]), 8, "y")
    datasets.check_pixel_range(RGB[None] // 128 * 255, "black and white")
    copies = "images of {} are exact copies of images of {}".format
    assert [line.split(";")[0].split("):")[0] for line in warned()] == [
        "x: not used: valid_x", "x: test_x: the brightest pixel is 63",
        "x: 2 of 4 classes have no training images (labels 2, 3",
        "x: 3 of 12 " + copies("test_x", "train_x"), "x: 1 of 8 " + copies("val_x", "train_x"),
        "x: 1 of 8 " + copies("val_x", "test_x"),
        "y: 6 of 8 classes have no training images (labels 1, 2, 3, 4, 6 and 1 more"]


# Folders of images

def write_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def make_folder(root, arrays, inside="", **folders):
    for split in datasets.splits_of(arrays):
        place = root / folders.get(split, split)
        for i, (x, y) in enumerate(zip(arrays[f"{split}_x"], arrays[f"{split}_y"])):
            write_image(place / ("cat", "dog", "emu", "fox")[y] / inside / f"{i:03}.png", x)
        write_image(place / ".ipynb_checkpoints" / "a.png", RGB)  # hidden, hence ignored
        write_image(place / "cat" / inside / ".ipynb_checkpoints" / "a.png", RGB)
    return root


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "animals", small_arrays(False))


@pytest.mark.parametrize("inside", ("", "images"))
@pytest.mark.parametrize("test, val", [("test", ""), ("test", "val"), ("test", "valid"),
                                       ("val", ""), ("valid", "")])
def test_a_folder_gives_pixels_and_sorted_classes(tmp_path, inside, test, val, warned):
    arrays = small_arrays(bool(val))
    data = load(make_folder(tmp_path, arrays, inside, test=test, val=val))
    check_form(data, 4, train=20, test=12, **({"val": 8} if val else {}))
    assert data.pop("classes").tolist() == ["cat", "dog", "emu", "fox"]
    for name in data:
        order = arrays[name[:-1] + "y"].argsort(kind="stable")
        assert np.array_equal(data[name], arrays[name][order])
    said = f"{tmp_path} has no test/: {test}/ is the test split"
    assert warned() == [said] * (test != "test")


def transparent(mode):
    """Returns a black square on transparency, in a mode of Pillow's."""
    image = np.zeros((32, 32, 4), np.uint8)
    image[8:24, 8:24, 3] = 255
    image = Image.fromarray(image)
    return image.quantize(4) if mode == "P" else image.convert(mode)


def turned(orientation):
    exif = Image.Exif()
    exif[datasets.EXIF_ORIENTATION] = orientation
    return {"exif": exif}


GREY = np.rint(RAMP / 257).astype(np.uint8)[..., None].repeat(3, 2)
SQUARE = np.pad(RGB[:16, :16] * 0, ((8, 8), (8, 8), (0, 0)), constant_values=255)
A_FIFTH, ON_WHITE = np.dstack([RGB, RGB[..., 0] | 255]), RGB.copy()
A_FIFTH[0, 0], ON_WHITE[0, 0] = (40, 80, 120, 51), (212, 220, 228)


@pytest.mark.parametrize("name, image, more, expected, said", [
    *((f"z.{end}", RAMP, {}, GREY, "1 scaled from 16 bits") for end in ("png", "tif", "pgm")),
    *(("z.png", transparent(mode), {}, SQUARE, "1 with transp") for mode in ("P", "LA", "RGBA")),
    ("z.png", A_FIFTH, {}, ON_WHITE, "1 with transp"), ("z.png", A_FIFTH | 255, {}, RGB | 255, ""),
    ("z.tif", Image.fromarray(RGB * 0).convert("CMYK"), {}, RGB * 0, "1 converted from CMYK"),
    ("z.png", np.full((50, 70), 77, np.uint8), {}, RGB * 0 + 77,
     "1 resized to 32x32 (1 of 50x70), 1 of them squashed to a square"),
    *((f"z.{end}", RGB, turned(orientation), expected, "1 turned" * (orientation > 1))
      for end in ("png", "tif") for orientation, expected in enumerate((
          RGB, RGB[:, ::-1], RGB[::-1, ::-1], RGB[::-1], RGB.swapaxes(0, 1), np.rot90(RGB, -1),
          np.rot90(RGB, 2).swapaxes(0, 1), np.rot90(RGB)), 1)),
    *(("z.tif", RAMP.astype(kind), {}, None, "") for kind in (np.int32, np.float32)),
    ("z.tif", RAMP, {"tiffinfo": {262: 0}}, None, ""),
    ("z.png", RAMP, {"transparency": 0}, None, "")])
def test_images_are_converted_or_refused(folder, warned, name, image, more, expected, said):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(folder / "train" / "fox" / name, **more)
    if expected is None:
        assert re.search(f"{name} has pixels .*: save it as an 8-bit PNG", refusal(folder))
    else:
        assert np.array_equal([load(folder)["train_x"][-1] for _ in range(2)], [expected] * 2)
        lines = warned()
        assert len(lines) == bool(said) and said in "".join(lines)


def test_what_a_folder_lacks_or_has_too_much_is_named(folder, tmp_path, warned):
    (folder / "extra").mkdir()
    (folder / "train" / "labels.csv").write_text("")
    write_image(folder / "train" / "fox" / "images" / "a.png", RGB)
    load(folder)
    assert warned() == [f"images of {folder}: 1 beside the class folders left out, 5 beside "
                        "images/ left out, folders not read: extra"]
    for i, (files, message) in enumerate((
            ("", "0 holds nothing; needed: train/<class>/<image>"),
            ("data_1.png", "1 holds data_1.png; needed: train/<class>/<image>"),
            ("train/a.png", "2/train holds a.png; needed:"),
            ("train/a/1.png Test/a/1.png", "3 holds Test, train; needed:"),
            ("train/a/.1.png test/a/1.png", "train/a has no images"),
            ("train/a/images/.1.png test/a/1.png", "train/a/images has no images"),
            ("train/a/b/1.png test/a/1.png", "train/a/b is a folder: move its images to"),
            ("train/a/1.png test/1.png", "test/a has no images"),
            ("train/a/1.png test/images/1.png", "test/images is not one of the classes"),
            ("train/a/1.png val/a/1.png valid/a/1.png", "9 has val/ and valid/"))):
        (tmp_path / str(i)).mkdir()
        for name in files.split():
            write_image(tmp_path / str(i) / name, RGB)
        assert message in refusal(tmp_path / str(i))
    (folder / "train" / "dog" / "001.png").write_text("hello")
    assert "dog/001.png is not a readable image" in refusal(folder)


@pytest.mark.parametrize("name", ("cifar10", "cifar100"))
def test_cifar_is_downloaded_by_one_process_and_then_read(tmp_path, monkeypatch, name):
    arrays, calls, source = small_arrays(False), [], (name, str(tmp_path / "data"))

    def download(root, train, download):
        calls.append(train)
        assert download and len(calls) <= 2, "no route to host\nand more"
        time.sleep(0.1)
        x, y = (arrays[("train_" if train else "test_") + part] for part in "xy")
        return types.SimpleNamespace(data=x, targets=y.tolist(), classes=arrays["classes"].tolist())

    monkeypatch.setattr(torchvision.datasets, name.upper(), download)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        loads = [pool.submit(load, *source) for _ in range(2)]
    for data in (*(one.result() for one in loads), load(*source)):
        assert_equal(data, arrays)
    assert calls == [True, False]
    (tmp_path / "data" / f"{name}.npz").unlink()
    assert re.search(f"no route to host.*{name}.npz.*cifar-{name[5:]}-python.tar.gz.*digits",
                     refusal(*source))
    assert not list(tmp_path.glob("data/*.npz*"))


# The examples of docs/data.md

def test_the_page_makes_npz_files_of_public_forms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rgb, grey, svhn = pixels(20, 28, 28, 3), pixels(20, 28, 28), pixels(32, 32, 3, 20)
    labels = np.arange(20, dtype=np.uint8)
    np.savez("pathmnist.npz", **{
        f"{split}_{part}": value for split in ("train", "val", "test")
        for part, value in (("images", rgb), ("labels", labels[:, None] % 9))})
    for split in ("train", "test"):
        scipy.io.savemat(f"{split}_32x32.mat", {"X": svhn, "y": labels[:, None] % 10 + 1})
    cells, svhn = [], svhn.transpose(3, 0, 1, 2)
    for i, image in enumerate(svhn):  # every second one as the path of a file
        Image.fromarray(image).save(path := pathlib.Path(f"{i}.png"))
        cells.append({"bytes": None if i % 2 else path.read_bytes(), "path": str(path)})
    table = {"img": cells, "label": labels % 10}
    keras = types.SimpleNamespace(load_data=lambda: [(grey, labels % 10)] * 2)
    for name, module in {"keras": {}, "keras.datasets": {"fashion_mnist": keras},
                         "pandas": {"read_parquet": lambda path: table}}.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**module))
    for name in ("data", "CIFAR-10-C"):
        pathlib.Path(name).mkdir()
    np.savez("data/cifar10.npz", **make_arrays(20, 12, classes=10))
    fog = np.lib.format.open_memmap("CIFAR-10-C/fog.npy", "w+", np.uint8, (50_000, 32, 32, 3))
    fog[40_000:] = np.arange(10_000)[:, None, None, None] % 251
    np.save("CIFAR-10-C/labels.npy", (np.arange(50_000) % 10).astype(np.uint8))

    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 6 and len(blocks[0].replace("\n\n", "\n").splitlines()) == 10
    exec("\n".join(blocks), {})
    border = ((0, 0), (2, 2), (2, 2), (0, 0))
    for name, k, sizes, x, y in (
            ("pathmnist32", 9, {"val": 20}, np.pad(rgb, border), labels % 9),
            ("fashion", 10, {}, np.pad(grey[..., None].repeat(3, 3), border), labels % 10),
            ("svhn", 10, {}, svhn, (labels + 1) % 10), ("hub", 10, {}, svhn, labels % 10),
            ("cifar10-fog5", 10, {}, fog[40_000:], np.arange(10_000) % 10)):
        data = load(f"{name}.npz")
        check_form(data, k, train=20, test=len(x), **sizes)
        assert np.array_equal(data["test_x"], x) and np.array_equal(data["test_y"], y)
    pathlib.Path("CIFAR-10-C/fog.npy").unlink()


# On the device

def prepare(arrays, **options):
    return datasets.prepare_data(arrays, torch.device("cpu"), **options)


def test_normalised_training_images_have_mean_0_and_deviation_1_in_every_channel():
    arrays = make_arrays(60, 12)
    data = prepare(arrays)
    x, test_x = (datasets.normalise(data[split][0], data) for split in ("train", "test"))
    assert x.shape == (60, 3, 32, 32) and x.dtype == torch.float32
    deviations, means = torch.std_mean(x.double(), (0, 2, 3), correction=0)
    assert means.abs().max() < 1e-6 and (deviations - 1).abs().max() < 1e-6
    green = arrays["train_x"][..., 1].astype(float)
    expected = (arrays["test_x"][3, 5, 7, 1] - green.mean()) / green.std()
    assert test_x[3, 1, 5, 7].item() == pytest.approx(expected, rel=1e-4)
    arrays["train_x"][..., 1] = 77
    with pytest.raises(errors.UserError, match="constant"):
        prepare(arrays)


def indices(split):
    return split[0][:, 0, 0, 0].tolist()


def test_splits_and_noised_labels_are_the_same_for_every_run(warned):
    arrays, subsets = make_arrays(60, 40), dict(val_split=13, train_images=20, test_images=15)
    arrays["train_x"][:, 0, 0, 0] = np.arange(60)  # each image has its index as first pixel
    data, clean = prepare(arrays, val_split=13), prepare(arrays, **subsets)
    train_index, val_index = (indices(data[split]) for split in ("train", "val"))
    assert len(val_index) == 13 and sorted(train_index + val_index) == list(range(60))
    assert np.array_equal(data["val"][1], arrays["train_y"][val_index])
    left = arrays["train_x"][train_index].astype(float)
    assert np.allclose([*data["mean"], *data["std"]], [*left.mean((0, 1, 2)), *left.std((0, 1, 2))])
    own = {"val_x": arrays["test_x"][:8], "val_y": arrays["test_y"][:8]}
    assert indices(prepare(arrays | own, val_split=13)["val"]) == val_index
    assert np.array_equal(prepare(arrays | own)["val"][0], own["val_x"])
    assert "val" not in prepare(arrays)
    for n in (60, 61):
        with pytest.raises(errors.UserError, match="val-split"):
            prepare(arrays, val_split=n)

    assert warned() == []
    prepare(arrays, train_images=2)
    line, = warned()
    assert line.startswith("--train-images and --val-split leave 2 images: 2 of 4 classes have no")

    noisy = prepare(arrays, **subsets, label_noise=0.5)
    torch.manual_seed(2)
    np.random.seed(2)
    again = prepare(arrays, **subsets, label_noise=0.5)
    assert [len(clean[split][1]) for split in ("train", "val", "test")] == [20, 13, 15]
    assert indices(clean["val"]) == val_index
    assert set(indices(clean["train"])) < set(train_index)
    changed = (noisy["train"][1] != clean["train"][1]).sum()
    assert 0 < changed <= 10, "half of the labels are drawn anew, and some stay by chance"
    for split, i, same in (("train", 1, again), ("train", 0, clean), ("val", 1, clean)):
        assert torch.equal(noisy[split][i], same[split][i])
    whole = make_arrays(6000, 4, classes=3)
    before = whole["train_y"].copy()
    images, labels = prepare(whole, label_noise=1.0)["train"]
    assert np.array_equal(whole["train_y"], before)  # the next run prepares them again
    assert np.shares_memory(np.asarray(images), whole["train_x"])
    counts = torch.bincount(labels, minlength=3)
    assert counts.sum() == 6000 and (counts - 2000).abs().max() < 5 * (6000 * 2 / 9) ** 0.5


def test_crops_and_flips_are_those_drawn():
    (offsets, flips), again = (datasets.draw_crops(2000, torch.Generator().manual_seed(1))
                               for _ in range(2))
    assert torch.equal(offsets, again[0]) and torch.equal(flips, again[1])
    assert offsets.shape == (2, 2000) and set(offsets.flatten().tolist()) == set(range(9))
    assert 900 < int(flips.sum()) < 1100
    assert abs(np.corrcoef(offsets.numpy())[0, 1]) < 0.1, "rows and columns move independently"
    padded = np.pad(pixels(7, 36, 40, 3), ((0, 0), (4, 4), (4, 4), (0, 0)))
    index = torch.arange(2000) % 7
    images = datasets.crop_and_flip(torch.from_numpy(padded), index, offsets, flips)
    for image, i, (top, left), flip in zip(images, index, offsets.T, flips):
        expected = padded[i, top:top + 36, left:left + 40]
        assert np.array_equal(image, expected[:, ::-1] if flip else expected)
