"""What a model's own image processor or feature extractor does, for the manifest."""

import logging
from pathlib import Path
from typing import Any

import transformers

from edgepeft.bundle.manifest import AudioPreprocessing, ImagePreprocessing

FILE = "preprocessor_config.json"
#: Image processors that do nothing but what the runtime does.
_IMAGE_PROCESSORS = {
    f"{name}ImageProcessor{backend}"
    for name in ("ViT", "DeiT", "Bit", "CLIP", "ConvNext")
    for backend in ("", "Pil", "Fast")
}
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
#: From this size on ConvNeXt's processor resizes without a crop.
_CONVNEXT_WHOLE = 384


def read_image_preprocessing(model: str) -> ImagePreprocessing | None:
    """What the image processor of a folder or hub id does; None where there is none, or one that does more
    than the runtime can."""
    processor = _load(transformers.AutoImageProcessor, model)
    if processor is None or type(processor).__name__ not in _IMAGE_PROCESSORS:
        return None
    settings = processor.to_dict()
    resample = _RESAMPLE.get(int(settings.get("resample") or 0))
    sizes = _sizes(settings)
    if resample is None or sizes is None:
        return None
    normalizes = settings.get("do_normalize")
    return ImagePreprocessing(
        resample=resample,
        rescale_factor=float(settings["rescale_factor"]) if settings.get("do_rescale") else 1.0,
        mean=tuple(map(float, settings["image_mean"])) if normalizes else (0.0,) * 3,
        std=tuple(map(float, settings["image_std"])) if normalizes else (1.0,) * 3,
        **sizes,
    )


def read_audio_preprocessing(model: str) -> AudioPreprocessing | None:
    """What the feature extractor of a folder or hub id does; None where there is none of wav2vec 2.0's."""
    extractor = _load(transformers.AutoFeatureExtractor, model)
    if type(extractor).__name__ != "Wav2Vec2FeatureExtractor":
        return None
    return AudioPreprocessing(int(extractor.sampling_rate), bool(extractor.do_normalize))


def _sizes(settings: dict[str, Any]) -> dict[str, int] | None:
    """Sizes of the resize and the crop."""
    size = settings.get("size") if settings.get("do_resize") else None
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    if size is not None and settings.get("crop_pct") is not None:
        edge = int(size["shortest_edge"])
        if edge >= _CONVNEXT_WHOLE:
            return {"height": edge, "width": edge}
        shortest = int(edge / settings["crop_pct"])
        return {"shortest_edge": shortest, "crop_height": edge, "crop_width": edge}
    found: dict[str, int] = {}
    if size is not None:
        if not set(size) <= {"height", "width"} and set(size) != {"shortest_edge"}:
            return None
        found |= {name: int(value) for name, value in size.items()}
    if crop is not None:
        found |= {"crop_height": int(crop["height"]), "crop_width": int(crop["width"])}
    return found


def _load(loader: Any, model: str) -> Any:
    """The processor; None where the model has none."""
    if Path(model).is_dir() and not (Path(model) / FILE).is_file():
        return None
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # that torchvision is not installed
    try:
        return loader.from_pretrained(model)
    except (OSError, ValueError, ImportError):
        return None
    finally:
        logger.setLevel(level)
