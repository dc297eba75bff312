"""What stops the training of a tokenizer that goes wrong, with the remedy."""


def codes_in_use(least, after, patience):
    return dict(
        metric="batch_code_perplexity", min=least, after=after, patience=patience,
        reason="The codebook collapses: raise task.entropy_weight, set task.revive_every, or give "
        "quantize/embedding a larger learning rate by optim.lr_scale",
    )  # fmt: skip


def latents_bounded():
    return dict(
        metric="latent_rms", max=100.0, patience=100,
        reason="The latents run away from their codes: lower optim.lr, or raise "
        "task.quantizer_weight or model.commitment_cost",
    )  # fmt: skip


def discriminator_beatable(after, patience):
    return dict(
        metric="disc/decided", max=0.95, after=after, patience=patience,
        reason="The discriminator is sure of nearly every patch and teaches nothing: lower its "
        "learning rate (optim.lr_scale), set task.r1_weight, or start later (task.gan_start)",
    )  # fmt: skip
