"""Images and recordings against Pillow and transformers' own processors."""

import struct
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image, ImageOps
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from edgepeft.bundle.manifest import AudioPreprocessing, ImagePreprocessing
from edgepeft.errors import DataError
from edgepeft.exporters.sources.preprocessing import read_audio_preprocessing, read_image_preprocessing
from edgepeft.runtime.preprocessing import audio, images
from edgepeft.runtime.preprocessing.resample import resize

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
SETTINGS = ImagePreprocessing("bilinear", 1 / 255, (0.5,) * 3, (0.5,) * 3, height=8, width=8)


def picture(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize("resample", RESAMPLE)
@pytest.mark.parametrize("size", [(20, 31), (64, 7), (7, 64), (45, 60), (1, 1), (44, 61)])
def test_resizing_is_pillows_bit_for_bit(resample: str, size: tuple[int, int]) -> None:
    """Smaller, larger, one axis only, not at all. Pillow is asked for one axis at a time: the order of the
    two depends on its version."""
    image = picture(45, 60)
    wide = Image.fromarray(image).resize((size[1], 45), RESAMPLE[resample])
    expected = wide.resize(size[::-1], RESAMPLE[resample])
    assert np.array_equal(resize(image, *size, resample), np.array(expected))


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 24, "width": 20}),
        DeiTImageProcessorPil(size={"height": 32, "width": 32}, crop_size={"height": 24, "width": 28}),
        BitImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 24, "width": 24}),
        BitImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 25, "width": 28}),
        ConvNextImageProcessorPil(size={"shortest_edge": 24}, crop_pct=0.9),
        ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    ],
    ids=["vit", "deit", "bit", "bit-padded", "convnext", "convnext-384"],
)
@pytest.mark.parametrize("shape", [(37, 50), (30, 90), (9, 9)])
def test_pixels_are_those_of_the_models_own_processor(
    processor: transformers.BaseImageProcessor, shape: tuple[int, int], tmp_path: Path
) -> None:
    """Read from the file that the processor saves."""
    processor.save_pretrained(tmp_path)
    settings = read_image_preprocessing(str(tmp_path))
    assert settings is not None
    image = picture(*shape)
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    got = images.preprocess(image, settings)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_processors_that_do_more_are_not_guessed_at(tmp_path: Path) -> None:
    """None of them, and a folder without any."""
    assert read_image_preprocessing(str(tmp_path)) is None
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "SamImageProcessor"}')
    assert read_image_preprocessing(str(tmp_path)) is None
    assert read_audio_preprocessing(str(tmp_path)) is None


@pytest.mark.parametrize("suffix", ["png", "ppm", "npy"])
def test_image_files_are_read(tmp_path: Path, suffix: str) -> None:
    """Without loss; a grey one where the model takes grey."""
    image = picture(12, 10)
    path = tmp_path / f"image.{suffix}"
    np.save(path, image) if suffix == "npy" else Image.fromarray(image).save(path)
    assert np.array_equal(images.read_image(path, 3), image)
    if suffix == "png":
        assert np.array_equal(
            images.read_image(str(path), 1)[:, :, 0], np.array(Image.open(path).convert("L"))
        )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"has shape \[4, 4\], expected \[height, width, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), "has shape"),
        (np.zeros((4, 4, 3), np.float32), "is of dtype float32, expected uint8"),
        (np.full((4, 4, 3), 256), "is of dtype int64, expected uint8"),
        ([[[1, 2, 3]], [[1]]], "different lengths"),
        (np.broadcast_to(np.uint8(0), (10**4, 10**4, 3)), r"has 100,000,000 pixels"),
        ("nowhere.png", "is no PNG, PPM or JPEG"),
        ("nowhere.npy", r"is no \.npy file"),
    ],
)
def test_images_that_cannot_be_used(value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        images.read_image(value, 3)


def test_a_picture_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    """Before there is room for it: 64 million pixels in 800 bytes."""
    path = tmp_path / "x.jpg"
    Image.fromarray(picture(16, 16)).save(path)
    whole = path.read_bytes()
    size = whole.index(b"\xff\xc0") + 5
    path.write_bytes(whole[:size] + (8000).to_bytes(2, "big") * 2 + whole[size + 4 :])
    with pytest.raises(DataError, match=r"says that it has 64,000,000 pixels, and its bytes hold at most"):
        images.read_image(path, 3)
    Image.fromarray(np.zeros((4000, 4000), np.uint8)).save(tmp_path / "flat.png")
    Image.fromarray(np.zeros((2000, 2000), np.uint8)).save(tmp_path / "flat.jpg")
    for name, edge in (("flat.png", 4000), ("flat.jpg", 2000)):
        assert images.read_image(tmp_path / name, 1).shape == (edge, edge, 1)


def test_a_sliver_is_not_blown_up() -> None:
    """A shortest edge of 224 of one pixel by a million would be 150 GB."""
    settings = ImagePreprocessing("bilinear", 1.0, (0.0,), (1.0,), None, None, 224, 224, 224)
    with pytest.raises(DataError, match="too narrow"):
        images.preprocess(np.zeros((1, 10**6, 1), np.uint8), settings)


def written(path: Path, data: bytes, width: int, channels: int = 1, rate: int = 16_000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return path


@pytest.mark.parametrize("normalize", [True, False])
def test_samples_are_those_of_the_models_own_extractor(tmp_path: Path, normalize: bool) -> None:
    """Read from the file that the extractor saves."""
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize)
    extractor.save_pretrained(tmp_path)
    settings = read_audio_preprocessing(str(tmp_path))
    assert settings == AudioPreprocessing(16_000, normalize)
    samples = (np.random.default_rng(0).standard_normal(4000) * 0.1 + 0.05).astype(np.float32)
    expected = extractor(samples, sampling_rate=16_000, return_tensors="np")["input_values"][0]
    got = audio.preprocess(audio.read_audio(samples, settings, 10**6), settings)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_of_every_width(tmp_path: Path, width: int) -> None:
    """The same sine within what the width resolves; two channels are averaged."""
    sine = 0.5 * np.sin(np.arange(300) * 0.1)
    whole = np.round(sine * 2 ** (8 * width - 1)).astype("<i4")
    if width == 1:
        data = (whole + 128).astype(np.uint8).tobytes()
    else:
        data = b"".join(int(value).to_bytes(width, "little", signed=True) for value in whole)
    settings = AudioPreprocessing(16_000, False)
    got = audio.read_audio(written(tmp_path / "mono.wav", data, width), settings, 10**6)
    np.testing.assert_allclose(got, sine, rtol=0, atol=2.0 ** (1 - 8 * width) + 1e-6)
    cut = audio.read_audio(tmp_path / "mono.wav", settings, 7)
    assert np.array_equal(cut, got[:7])
    two = np.frombuffer(data, np.uint8).reshape(-1, width).repeat(2, axis=0).tobytes()
    stereo = audio.read_audio(written(tmp_path / "stereo.wav", two, width, 2), settings, 10**6)
    np.testing.assert_allclose(stereo, got, atol=1e-6)


def test_recordings_that_cannot_be_used(tmp_path: Path) -> None:
    settings = AudioPreprocessing(16_000, True)
    (tmp_path / "broken.wav").write_bytes(b"RIFF....")
    whole = written(tmp_path / "whole.wav", bytes(20), 2).read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[:16] + b"\xff" + whole[17:])  # a chunk beyond the end
    (tmp_path / "wide.wav").write_bytes(whole[:34] + b"\x28" + whole[35:])
    np.save(tmp_path / "cut.npy", np.zeros(3, np.float32))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes().replace(b"}", b"("))
    for value, message in (
        (written(tmp_path / "slow.wav", bytes(20), 2, rate=8_000), "has 8000 samples a second"),
        (written(tmp_path / "empty.wav", b"", 2), "holds no samples"),
        (tmp_path / "broken.wav", "is no WAV file"),
        (tmp_path / "cut.wav", "is no WAV file"),
        (tmp_path / "wide.wav", "has samples of 5 bytes, expected 1 to 4"),
        (tmp_path / "cut.npy", "is no .npy file"),
        (tmp_path / "nowhere.wav", "is no WAV file"),
        (np.zeros((2, 2), np.float32), r"expected \[samples\]"),
        (np.array([1, 2]), "expected"),
        (np.array([np.nan]), "no finite number"),
    ):
        with pytest.raises(DataError, match=message):
            audio.read_audio(value, settings, 10**6)
    with pytest.raises(DataError, match="too large to be normalized"):
        audio.preprocess(np.array([3e38, -3e38], np.float32), settings)
    np.testing.assert_allclose(
        audio.read_audio(np.array([0, 2**14], np.int16), AudioPreprocessing(16_000, False), 9), [0, 0.5]
    )


def test_a_plan_counts_what_reading_pictures_imports(tmp_path: Path) -> None:
    """After `load_decoders`, decoding a file brings in nothing of Pillow's."""
    Image.new("RGB", (3, 2)).save(tmp_path / "picture.jpg")
    code = (
        "import sys; from edgepeft.runtime.preprocessing.images import load_decoders, read_image; "
        "load_decoders(); before = set(sys.modules); "
        "read_image(sys.argv[1], 3); print(sorted(set(sys.modules) - before))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "picture.jpg")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["png", "jpeg"])
def test_a_photograph_is_turned_upright(form: str, orientation: int, tmp_path: Path) -> None:
    """As transformers turns it when it opens a file: phones write how they were held."""
    pixels = np.random.default_rng(1).integers(0, 256, (8, 13, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x112] = orientation
    path = tmp_path / f"photo.{form}"
    image.save(path, exif=exif)
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    np.testing.assert_array_equal(images.read_image(path, 3), expected)


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_an_extended_header_of_pcm_is_read(channels: int, tmp_path: Path) -> None:
    """Of 24 bits, as recorders write them."""
    numbers = np.random.default_rng(0).integers(-(2**23), 2**23, (100, channels))
    data = b"".join(int(value).to_bytes(3, "little", signed=True) for value in numbers.ravel())
    layout = struct.pack("<HHIIHHHHI", 0xFFFE, channels, 16000, 48000 * channels, 3 * channels, 24, 22, 24, 0)
    layout += bytes.fromhex("0100000000001000800000aa00389b71")
    chunks = b"".join(
        name + struct.pack("<I", len(content)) + content
        for name, content in ((b"LIST", b"INFO"), (b"fmt ", layout), (b"data", data))
    )
    path = tmp_path / "recording.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks)
    read = audio.read_audio(path, AudioPreprocessing(16000, normalize=False), 10_000)
    np.testing.assert_allclose(read, numbers.mean(axis=1) / 2**23, atol=1e-6)
