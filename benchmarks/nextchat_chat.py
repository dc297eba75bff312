"""A chat answer with one box: cached, against everything once more per token, against torch.

    python benchmarks/nextchat_chat.py                # CPU, float32: a decoder of 126 M parameters
    python benchmarks/nextchat_chat.py --new 64

One image, one question; the answer is greedy and says `<at>` as its tenth token, so that a box is
decoded and its embedding fed back within the answer. Three programs with the same random weights
take turns in one process: ours with a cache; ours without, which reads the whole conversation again
for every token; transformers' CLIP and LLaMA on torch with their cache, and the boxes by hand.
Ids and boxes of all three must be equal before anything is timed.
"""

import argparse
import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import llama_decode
import machine
import numpy as np

from vlm_jax.decoding import generate
from vlm_jax.models import clip, llama
from vlm_jax.systems.nextchat import network
from vlm_jax.weights import clip as clip_weights
from vlm_jax.weights import convert

AT = 9  # the tenth token of the answer is `<at>`
CFG = network.NextChatConfig(
    dataclasses.replace(clip.VISION_PRESETS["b16"], projection=0),
    llama.LlamaConfig(8448 + network.NUM_ADDED, 768, 16, 2048, 12, max_tokens=512),
)


def conversation(cfg):
    """int32[1, T]: words, an image, words."""
    rng = np.random.default_rng(0)
    before, behind = (rng.integers(3, cfg.num_base, size) for size in (35, 20))
    image = [cfg.start_id, *[cfg.patch_id] * cfg.num_image, cfg.end_id]
    return np.concatenate([before, image, behind])[None].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class AtPlace:
    """A logits processor: the answer has that id at that place, and nowhere else."""

    token: int
    place: int

    def init(self, shape, vocabulary):
        return jnp.zeros(shape, jnp.int32)

    def __call__(self, logits, drawn):
        here = (drawn == self.place)[..., None]
        it = jnp.arange(logits.shape[-1]) == self.token
        return jnp.where(here == it, logits, -jnp.inf)

    def update(self, drawn, tokens, source):
        return drawn + 1


def feed_of(module):
    """What follows a token: behind `<at>` the embedding of the box that its state means."""

    def feed(drawn, was_at_r):
        x_rd = module.decoder.embed(drawn.token[:, None])[:, 0]
        box_rx = module.box_decoder(drawn.hidden)
        answer_rd = module.box_encoder(box_rx).astype(x_rd.dtype)
        return jnp.where(was_at_r[:, None], answer_rd, x_rd), drawn.token == module.cfg.at_id

    return feed


def cached(cfg, params, num_new):
    """(image, tokens) -> (ids[N], box[4])."""
    decoder, layout = llama.decode_form(params["decoder"], cfg.decoder)
    params, cfg = {**params, "decoder": decoder}, dataclasses.replace(cfg, decoder=layout)

    @jax.jit
    def run(params, image, tokens):
        module = network.make(cfg).bind(params)
        x_btd, keep = module.inputs(tokens, image), feed_of(module)

        def feed(drawn, carry):
            was_at_r, box_rx = carry
            box_rx = jnp.where(was_at_r[:, None], module.box_decoder(drawn.hidden), box_rx)
            x_rd, was_at_r = keep(drawn, was_at_r)
            return x_rd, (was_at_r, box_rx)

        made = generate.generate(
            module.decoder, x_btd, num_new, jax.random.key(0), feed=feed,
            carry=(jnp.zeros(1, bool), jnp.zeros((1, 4))),
            logits_processors=(AtPlace(cfg.at_id, AT),),
        )  # fmt: skip
        return made.tokens_bst[0, 0], made.carry[1][0]

    return functools.partial(run, params)


def again(cfg, params, num_new):
    """The same, the whole conversation read for every token."""

    @jax.jit
    def begin(params, image, tokens):
        x_btd = network.make(cfg).bind(params).inputs(tokens, image)
        return jnp.pad(x_btd, ((0, 0), (0, num_new), (0, 0)))

    @jax.jit
    def token(params, x_btd, last, drawn, was_at):
        module = network.make(cfg).bind(params)
        hidden_bd = module.decoder.transform(x_btd)[0][:, last]
        logits = module.decoder.logits(hidden_bd[:, None])[:, 0]
        id_b = jnp.argmax(AtPlace(cfg.at_id, AT)(logits, jnp.array([drawn])), axis=-1)
        box_bx = module.box_decoder(hidden_bd)
        x_bd = module.decoder.embed(id_b[:, None])[:, 0]
        x_bd = jnp.where(was_at, module.box_encoder(box_bx).astype(x_bd.dtype), x_bd)
        return id_b[0], box_bx[0], x_btd.at[:, last + 1].set(x_bd)

    def run(image, tokens):
        x_btd, ids, box, was_at = begin(params, image, tokens), [], None, False
        for i in range(num_new):
            last = tokens.shape[1] - 1 + i
            id_, found, x_btd = token(params, x_btd, last, i, was_at)
            box = found if was_at else box
            ids.append(int(id_))
            was_at = ids[-1] == cfg.at_id
        return np.array(ids), box

    return run


def of_torch(cfg, params, num_new):
    """The same by transformers' tower and language model, with their cache."""
    import torch
    import transformers

    lm = llama_decode.torch_model(cfg.decoder, params["decoder"])
    v = cfg.vision
    tower = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=v.width, intermediate_size=v.hidden, num_hidden_layers=v.depth,
            num_attention_heads=v.heads, image_size=v.image_size, patch_size=v.patch_size,
            hidden_act=v.activation, layer_norm_eps=v.norm_eps,
        )
    ).eval()  # fmt: skip
    state = convert.revert({"vision": params["vision"]}, clip_weights.HF_RULES)
    state = {name: torch.tensor(load()) for name, load in state.items()}
    names = set(tower.state_dict())
    if not set(state) <= names:  # without the outer name from transformers 5.4 on
        state = {name.removeprefix("vision_model."): x for name, x in state.items()}
    tower.load_state_dict(state)

    def perceptron(tree, activation):
        layers = []
        for i in sorted(tree["layers"], key=int):
            kernel, bias = (
                torch.tensor(np.asarray(tree["layers"][i][k])) for k in ("kernel", "bias")
            )
            layer = torch.nn.Linear(*kernel.shape)
            layer.weight.data, layer.bias.data = kernel.T.contiguous(), bias
            layers += [layer] if i == "0" else [activation(), layer]
        return torch.nn.Sequential(*layers)

    projector = perceptron(params["projector"], torch.nn.GELU)
    encoder, decoder = (
        perceptron(params[f"box_{k}"], torch.nn.ReLU) for k in ("encoder", "decoder")
    )
    embed = lm.get_input_embeddings()

    @torch.inference_mode()
    def run(image, tokens):
        ids = torch.tensor(np.asarray(tokens)).long()
        pixels = torch.tensor(np.moveaxis(np.asarray(image), 3, 1).copy())
        states = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        x = embed(ids)
        x[ids == cfg.patch_id] = projector(states)[0]
        past, made, box, was_at = None, [], None, False
        for i in range(num_new):
            out = lm.model(inputs_embeds=x, past_key_values=past, use_cache=True)
            past, hidden = out.past_key_values, out.last_hidden_state[:, -1]
            logits = lm.lm_head(hidden)
            if i == AT:
                made.append(cfg.at_id)
            else:
                logits[:, cfg.at_id] = -torch.inf
                made.append(int(logits.argmax(-1)))
            if was_at:
                box = decoder(hidden)
                x = encoder(box)[:, None]
            else:
                x = embed(torch.tensor([[made[-1]]]))
            was_at = made[-1] == cfg.at_id
        return np.array(made), box[0].numpy()

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new", type=int, default=40, help="tokens of the answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="to see that it runs")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    args = parser.parse_args()
    if args.new < AT + 3:
        sys.exit(f"--new must be at least {AT + 3}: a box comes behind token {AT}")
    cfg = network.PRESETS["tiny"] if args.tiny else CFG
    params = jax.jit(network.make(cfg).init)(jax.random.key(0))
    side = cfg.vision.image_size
    image = np.random.default_rng(1).standard_normal((1, side, side, 3), np.float32)
    tokens = conversation(cfg)
    programs = {"cached": cached, "all again per token": again}
    if not args.alone:
        programs["transformers + torch, cached"] = of_torch
    runs = {
        name: functools.partial(make(cfg, params, args.new), image, tokens)
        for name, make in programs.items()
    }
    results = {name: [np.asarray(x) for x in run()] for name, run in runs.items()}
    ids, box = results["cached"]
    assert ids[AT] == cfg.at_id
    for name, (other_ids, other_box) in results.items():
        equal, error = (other_ids == ids).mean(), np.abs(other_box - box).max()
        print(f"{name}: {equal:.0%} of the ids equal, box within {error:.1e}", flush=True)
        assert equal == 1 and error < 1e-3, "not the same answer"
    parts = {
        "image alone": jax.jit(lambda image: network.make(cfg).bind(params).image_vectors(image)),
        "image and prompt": cached_prefill(cfg, params),
    }
    arguments = {"image alone": (image,), "image and prompt": (image, tokens)}
    for name, part in parts.items():
        runs[name] = functools.partial(part, *arguments[name])
        jax.block_until_ready(runs[name]())
    times, rows = machine.take_turns(runs, args.rounds), []
    for name, time in times.items():
        row = {"what": name, "s": f"{time.wall_s:.3f}", "CPU s": f"{time.cpu_s:.3f}"}
        row["of cached"] = f"{time.wall_s / times['cached'].wall_s:.2f}"
        row["CPU ratio"] = f"{time.cpu_s / times['cached'].cpu_s:.2f}"
        rows.append(machine.note(row))
    print(f"\n{tokens.shape[1]} places of prompt, {args.new} new tokens, one box, float32\n")
    machine.print_table(rows)
    print(f"\n{machine.describe()}")


def cached_prefill(cfg, params):
    """(image, tokens) -> logits of the first token of the answer."""
    decoder, layout = llama.decode_form(params["decoder"], cfg.decoder)
    params, cfg = {**params, "decoder": decoder}, dataclasses.replace(cfg, decoder=layout)

    @jax.jit
    def run(params, image, tokens):
        module = network.make(cfg).bind(params)
        cache = module.decoder.make_cache(*tokens.shape)
        return module.decoder.step(module.inputs(tokens, image), cache).logits

    return functools.partial(run, params)


if __name__ == "__main__":
    main()
