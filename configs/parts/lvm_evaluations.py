"""The evaluations of LVM's paper (arXiv 2312.00785, sec. 4), for all sizes."""


def paper(lead, shots=5, rows=32):
    """The paper's evaluations, each inactive until its `path` is given.

    Args:
      lead: whether prompts begin with BOS: as runs of our own are trained. The reference and its
        released weights have none (`:reference`), nor has its perplexity.
      shots: pairs in front of a query; 5 in the paper.
      rows: of a batch, a multiple of data * fsdp of the mesh.
    """

    def prompts(**source):
        return dict(mixture=source, packing="none")

    def few_shot(kind, answer, queries, **fields):
        pairs = dict(type="few_shot", answer=answer, shots=shots, queries=queries)
        return dict(
            type="few_shot", kind=kind, batch_size=rows, data=prompts(pairs=pairs),
            formatter=dict(images=2 * shots + 1, targets=1, lead=lead), **fields,
        )  # fmt: skip

    masks, boxes = (dict(type="pascal5i", kind=kind, path="") for kind in ("mask", "box"))
    photos = dict(type="image_folder", path="", limit=1000)  # ImageNet's validation images
    return dict(
        # The upstream JSONL {"input": [paths], "target": [paths]}.
        perplexity=dict(
            type="perplexity", batch_size=rows, formatter=dict(images=15, targets=1, lead=False),
            data=prompts(list=dict(type="visual_prompts", path="")),
        ),
        # Token files of videos, 16 frames a sentence.
        context=dict(
            type="context_perplexity", tokens_per_image=256, lead_tokens=1,
            batch_size=rows, data=prompts(videos=dict(type="array_record", path="")),
        ),
        segmentation=few_shot("segmentation", "mask", masks),
        detection=few_shot("detection", "mask", boxes),
        colorization=few_shot("colorization", "colour", photos, lpips=True),
        # The upstream JSONL {"input": [paths], "output": path}.
        generation=dict(
            type="generation", batch_size=rows, candidates=2, resize_output="", show_inputs=False,
            formatter=dict(images=15, targets=1, lead=lead),
            data=prompts(list=dict(type="visual_prompts", path="", output=True)),
        ),
    )  # fmt: skip
