"""LVM as a Task: next-token prediction over visual sentences (arXiv 2312.00785, sec. 3).

    tokens ─ llama ─ logits ─ cross-entropy with the next token
                     └ predict["score"]     log-probability of every target
                     └ predict["continue"]  ids of the images after the context

Images exist only at the edges, on the host: `tools` tokenize them before training, the formatters
of evaluations (prompts.py, rows.py) encode prompts and decode ids with the frozen tokenizer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.decoding import generate, sampling
from vlm_jax.encoders import image_tokenizer
from vlm_jax.models import llama
from vlm_jax.nn import functional
from vlm_jax.ops import losses
from vlm_jax.program import config as config_lib
from vlm_jax.systems.lvm import prompts, rows, token_files

_NOT_NEGATIVE = (
    "loss_chunk", "context_images", "lead_tokens", "image_side", "temperature", "top_k"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LvmTask:
    """See the module.

    Attributes:
      cfg: of the network.
      loss_mean: "row" is the reference (a mean of row means), "token" the mean over all tokens.
      attention: "causal" over the whole row, as the reference packs its stream, or "documents":
        no attention across sentences; `data.packing` must fit.
      loss_chunk: positions whose logits exist at once; 0 makes all logits. With 8,292 ids they
        are small, and chunks cost time.
      codebook_size: ids below are visual; the others are never generated.
      tokens_per_image: ids of one image.
      context_images: images of a training row that predict["continue"] sees; of a prompt, see
        prompts.py, it sees all.
      lead_tokens: ids before the first image of a row (BOS).
      tokenizer: of pictures: "tiny" or a folder; "" has none.
      image_side: pixels of its images; 0 is the side it was trained for.
      temperature, top_k, top_p: of predict["continue"].
    """

    cfg: llama.LlamaConfig
    loss_mean: str = "row"
    attention: str = "causal"
    loss_chunk: int = 0
    codebook_size: int = 8192
    tokens_per_image: int = 256
    context_images: int = 7
    lead_tokens: int = 1
    tokenizer: str = ""
    image_side: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    sharding_rules = llama.SHARDING_RULES
    inference_rules = llama.DECODE_SHARDING_RULES

    def __post_init__(self):
        if self.loss_mean not in ("row", "token"):
            raise ValueError(f"task.loss_mean={self.loss_mean!r} is neither 'row' nor 'token'")
        if self.attention not in ("causal", "documents"):
            raise ValueError(f"task.attention={self.attention!r}: 'causal' or 'documents'")
        config_lib.check_ranges(
            self,
            **dict.fromkeys(("codebook_size", "tokens_per_image"), (1, 2**31 - 1)),
            **dict.fromkeys(_NOT_NEGATIVE, (0, 2**31 - 1)),
            top_p=(0, 1),
        )
        if self.codebook_size > self.cfg.vocab_size:
            raise ValueError(
                f"task.codebook_size={self.codebook_size} is more than "
                f"model.vocab_size={self.cfg.vocab_size}"
            )

    @functools.cached_property
    def network(self) -> functional.Functional:
        """The LLaMA behind its functional boundary."""
        return llama.make(self.cfg)

    @property
    def predict(self) -> Mapping[str, Any]:
        """Named predictors; see the module."""
        return {"score": self._score, "continue": self._continue}

    def init(self, rng: jax.Array) -> functional.Params:
        """Random parameters, all matrices N(0, 0.02)."""
        return self.network.init(rng)

    def loss(self, params, batch, rng):
        """(terms, metrics) of a batch; see the table in `format.py`."""
        module = self.network.bind(params)
        hidden_btd = self._hidden(module, batch)
        targets, weights = batch["targets"], batch["weights"]
        if self.loss_chunk:
            loss, metrics = losses.chunked_cross_entropy_terms(
                hidden_btd,
                module.head_matrix(),
                targets,
                weights,
                mean=self.loss_mean,
                chunk=self.loss_chunk,
            )
        else:
            logits_btv = module.logits(hidden_btd)
            loss, metrics = losses.cross_entropy_terms(
                logits_btv, targets, weights, mean=self.loss_mean
            )
        return {"tokens": loss}, {
            "accuracy": metrics["accuracy"],
            "scored_tokens": metrics["tokens"],
        }

    def check_data(self, data: Any, formatter: Any, name: str) -> None:
        """Raises ConfigError when token files do not fit this recipe; see `token_files.check`."""
        fields = self.tokenizer, self.image_side, self.codebook_size, self.tokens_per_image
        sha256 = functools.partial(_sha256, *fields) if self.tokenizer else None
        expected = token_files.Expected(self.tokens_per_image, self.codebook_size, sha256)
        try:
            if self.tokenizer:
                self._image_tokenizer()
        except (OSError, ValueError) as error:
            raise config_lib.ConfigError(f"task.tokenizer={self.tokenizer!r}: {error}") from error
        token_files.check(data, formatter, expected, name)

    def check_batch(self, batch: Mapping[str, np.ndarray]) -> None:
        """Raises ConfigError when a batch cannot be learned from by this model."""
        _, length = batch["tokens"].shape
        if length > self.cfg.max_tokens:
            raise config_lib.ConfigError(
                f"rows of {length} tokens are longer than model.max_tokens={self.cfg.max_tokens}; "
                f"lower formatter.max_tokens or raise model.max_tokens"
            )
        if (largest := int(batch["tokens"].max())) >= self.cfg.vocab_size:
            raise config_lib.ConfigError(
                f"token id {largest} for a model of model.vocab_size={self.cfg.vocab_size} ids; "
                "formatter.vocab_size must not be larger"
            )
        if not np.any(batch["weights"]):
            raise config_lib.ConfigError(
                "no token of the first batch carries loss; check formatter and data"
            )
        if self.attention == "causal" and batch["segments"].max() > 1:
            raise config_lib.ConfigError(
                "rows hold several documents, and task.attention='causal' would let them see each "
                "other; set task.attention='documents' or data.packing='stream'"
            )

    def units_per_step(self, batch) -> tuple[str, float]:
        """Tokens per update."""
        count, length = batch["tokens"].shape
        return "tokens", float(count * length)

    def flops_per_step(self, batch) -> float:
        """Model FLOPs of one update; attention counts its causal half."""
        count, length = batch["tokens"].shape
        return count * length * llama.flops_per_token(self.cfg, length, causal_half=True)

    def prompt_formatter(
        self, formatter: Any, *, images: int, targets: int = 1, lead: bool = True
    ) -> prompts.Formatter:
        """For evaluations on prompts; `formatter` is that of the run.

        Args:
          formatter: its `encode` says what rows begin with.
          images: context images of a prompt, at most.
          targets: images to predict.
          lead: begin prompts with BOS, as rows of our own runs do. False is the reference, and
            right for its released weights and for its perplexity.

        Raises:
          ConfigError: more images than the model takes, or the tokenizer does not fit.
        """
        lead_ids = formatter.encode({"tokens": b""})[0][: self.lead_tokens] if lead else ()
        needed = len(lead_ids) + (images + targets) * self.tokens_per_image - 1
        if needed > self.cfg.max_tokens:
            raise config_lib.ConfigError(
                f"{images}+{targets} images take {needed} tokens, and model.max_tokens is "
                f"{self.cfg.max_tokens}; ask for fewer"
            )
        return prompts.Formatter(
            images=images,
            targets=targets,
            side=self._image_tokenizer().side if self.tokenizer else 0,
            size=self.tokens_per_image,
            lead_ids=tuple(map(int, lead_ids)),
            tokenizer=self._image_tokenizer if self.tokenizer else None,
        )

    def row_reader(self, formatter: Any) -> rows.RowReader:
        """For evaluations on the rows of a run."""
        del formatter
        return rows.RowReader(
            context_images=self.context_images,
            lead_tokens=self.lead_tokens,
            size=self.tokens_per_image,
            codebook_size=self.codebook_size,
            tokenizer=self._image_tokenizer,
        )

    def _hidden(self, module, batch):
        segments = batch["segments"] if self.attention == "documents" else None
        hidden_btd, _ = module.transform(
            module.embed(batch["tokens"]),
            positions_bt=batch["positions"],
            segments_bt=segments,
        )
        return hidden_btd

    def inference_params(self, params):
        """The decode layout; see `llama.decode_form`."""
        return llama.decode_form(params, self.cfg)[0]

    def _score(self, params, batch, rng):
        layout = llama.decoding_config(params, self.cfg)
        # Parameters as they are trained are scored as they are trained.
        module = llama.make(layout if layout.fused else self.cfg).bind(params)
        logits_btv = module.logits(self._hidden(module, batch))
        return {"logp": losses.token_logp(logits_btv, batch["targets"])}

    def _continue(self, params, batch, rng, *, temperature=None, top_k=None, top_p=None):
        """Ids of the next image after `context_images` of a row, or of all targets of a prompt.

        Of rows also token_match float32[B], the share of ids that are the true ones. None is what
        the task says.
        """
        size, true_ids = self.tokens_per_image, None
        if "prompt" in batch:
            prompt_bt, valid_bt = batch["prompt"], batch["prompt_valid"]
            new = batch["target_ids"].shape[1] * size
        else:
            end = self.lead_tokens + self.context_images * size
            if batch["tokens"].shape[1] + 1 < end + size:
                raise ValueError(
                    f"rows of {batch['tokens'].shape[1]} tokens hold no {self.context_images} "
                    f"context images of {size} ids and one more; lower task.context_images"
                )
            prompt_bt, valid_bt, new = batch["tokens"][:, :end], None, size
            true_ids = batch["targets"][:, end - 1 : end - 1 + size]  # target t is token t + 1
        cfg = llama.decoding_config(params, self.cfg)
        module = llama.make(cfg).bind(params)
        sampler = sampling.Sampler(
            temperature=self.temperature if temperature is None else temperature,
            top_k=self.top_k if top_k is None else top_k,
            top_p=self.top_p if top_p is None else top_p,
            suppress_from=self.codebook_size,
        )
        made = generate.generate(
            module, module.embed(prompt_bt), new, rng, sampler=sampler, valid_bt=valid_bt
        )
        ids = made.tokens_bst[:, 0]
        if true_ids is None:
            return {"ids": ids}
        return {"ids": ids, "token_match": (ids == true_ids).mean(axis=1, dtype=jnp.float32)}

    def _image_tokenizer(self) -> Any:
        return _tokenizer(
            self.tokenizer, self.image_side, self.codebook_size, self.tokens_per_image
        )


@functools.lru_cache(maxsize=2)
def _tokenizer(name: str, side: int, codebook_size: int, tokens_per_image: int) -> Any:
    if not name:
        raise ValueError("task.tokenizer is empty, and pictures need one: 'tiny' or a folder")
    return image_tokenizer.ImageTokenizer.load(
        name, side=side, codebook_size=codebook_size, tokens_per_image=tokens_per_image
    )


@functools.lru_cache(maxsize=2)
def _sha256(*fields: Any) -> str:
    return token_files.digest(_tokenizer(*fields))
