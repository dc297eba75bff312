"""What survives a tokenizer: closeness to the photo, use of the codebook, pictures to look at."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np

from vlm_jax.data import images
from vlm_jax.metrics import frechet as frechet_lib
from vlm_jax.metrics import image_quality, perceptual
from vlm_jax.models import vgg
from vlm_jax.program import passes
from vlm_jax.weights import lpips as lpips_weights


@dataclasses.dataclass
class Evaluator:
    """Scores `predict` over one pass and draws originals above reconstructions.

    Attributes:
      predict: a predictor that gives image01, recon01 (float32[B, S, S, 3]) and ids (int32[B, T]).
      codes: size of the codebook; codes that never occur count as unused.
      columns, rows: of the picture; one row is a row of originals and one of reconstructions.
      cell: side of an image in the picture, in pixels.
      ssim: structural similarity too (sides of 11 pixels at least).
      lpips: LPIPS too; reads the weights of VGG16.
      frechet: distance between the sets of photos and reconstructions too.
      layer: the features of `frechet`, one of `models.vgg.LAYERS`.
      vgg, heads: files with the weights; see `weights.lpips.load`.
    """

    predict: str = "reconstruct"
    codes: int = 8192
    columns: int = 8
    rows: int = 3
    cell: int = 96
    ssim: bool = False
    lpips: bool = False
    frechet: bool = False
    layer: str = "relu5_3"
    vgg: str = ""
    heads: str = ""

    needs = ("image01", "recon01", "ids")
    baselines = dict.fromkeys(("flat_psnr", "thumbnail_psnr"), "psnr")

    def __post_init__(self):
        if self.layer not in vgg.LAYERS:
            raise ValueError(f"layer={self.layer!r} is none of {', '.join(vgg.LAYERS)}")

    def run(self, data: passes.Pass) -> dict[str, float]:
        """Writes `reconstructions.png`; returns scalars:

        psnr                   mean over images, dB
        flat_psnr              of the mean colour of every image
        thumbnail_psnr         of the image made as small as its grid of ids, and large again
        ssim, lpips            means over images
        frechet_vgg16_<layer>  between photos and reconstructions; not FID, see `metrics.frechet`
        code_usage             share of the codes that occur
        code_perplexity        exp of the entropy of the code frequencies; at most `codes`

        Raises:
          ValueError: no readable image.
          DownloadError, WeightsError: the weights of VGG16 cannot be had.
        """
        measures = self._measures()
        lines: list[tuple[int, dict[str, float]]] = []
        describe, photos, decoded = None, frechet_lib.Moments(), frechet_lib.Moments()
        if self.frechet:
            describe = perceptual.Vgg16Features(self._weights(), self.layer)
        shown, counts_e = [], np.zeros(self.codes, np.int64)
        for batch in data.batches:
            outputs, valid = data.predict(batch), batch.valid
            image01, recon01 = outputs["image01"][valid], outputs["recon01"][valid]
            found = {name: measure(image01, recon01) for name, measure in measures.items()}
            for name, guess01 in _guesses(image01, outputs["ids"].shape[1]).items():
                found[name] = image_quality.psnr(image01, guess01)
            for i, row in enumerate(batch.rows[valid].tolist()):
                lines.append((row, {name: float(values[i]) for name, values in found.items()}))
            if describe:
                photos.add(describe(image01))
                decoded.add(describe(recon01))
            counts_e += np.bincount(outputs["ids"][valid].ravel(), minlength=self.codes)
            for pair in zip(image01, recon01):
                if len(shown) < self.columns * self.rows:
                    shown.append([images.to_u8(x) for x in pair])
        lines = data.gather(lines)
        count, counts_e = len(lines), data.add(counts_e)
        if not count:
            raise ValueError("reconstruction: the evaluation data hold no readable image")
        if data.first and shown:
            (data.folder / "reconstructions.png").write_bytes(images.encode(self._draw(shown)))
        p_e = counts_e[counts_e > 0] / counts_e.sum()
        results = {name: float(np.mean([line[name] for line in lines])) for name in lines[0]}
        if describe:
            photos, decoded = (frechet_lib.merged(data.parts(x.state)) for x in (photos, decoded))
            results[f"frechet_vgg16_{self.layer}"] = frechet_lib.distance(photos, decoded)
            if photos.is_singular and data.first:
                print(
                    f"[eval] frechet_vgg16_{self.layer} of {count} images and "
                    f"{np.size(photos.mean)} features is biased upwards; compare it only with "
                    f"values of the same images",
                    file=sys.stderr,
                )
        return results | {
            "code_usage": float((counts_e > 0).mean()),
            "code_perplexity": float(np.exp(-np.sum(p_e * np.log(p_e)))),
            "images": float(count),
        }

    def _measures(self):
        measures = {"psnr": image_quality.psnr}
        if self.ssim:
            measures["ssim"] = image_quality.ssim
        if self.lpips:
            measures["lpips"] = perceptual.Lpips(self._weights())
        return measures

    def _weights(self):
        return lpips_weights.load(self.vgg, self.heads)

    def _draw(self, shown):
        rows, labels = [], []
        for start in range(0, len(shown), self.columns):
            pairs = shown[start : start + self.columns]
            rows += [[pair[0] for pair in pairs], [pair[1] for pair in pairs]]
            labels += ["photo", "decoded"]
        return images.draw_grid(rows, row_labels=labels, cell=self.cell)


def _guesses(image01: np.ndarray, num_ids: int) -> dict[str, np.ndarray]:
    """What costs no tokenizer: the mean colour, and as many pixels as there are ids."""
    flat01 = np.broadcast_to(image01.mean(axis=(1, 2), keepdims=True), image01.shape)
    side = max(1, round(num_ids**0.5))
    small = [images.resize(images.resize(images.to_u8(x), side), x.shape[:2]) for x in image01]
    thumbnail01 = np.reshape([images.to01(x) for x in small], image01.shape)
    return {"flat_psnr": flat01, "thumbnail_psnr": thumbnail01}
