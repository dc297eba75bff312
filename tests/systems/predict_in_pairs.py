"""One process of two that predict together; run by test_inference_params.py.

    python tests/systems/predict_in_pairs.py RANK PORT FOLDER

Writes FOLDER/SYSTEM_PREDICTOR_LAYOUT.npz, from process 0.
"""

import os
import sys

if __name__ == "__main__":
    rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=4 "
        "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    )
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
    import numpy as np

    from tests.systems import test_inference_params as shared
    from vlm_jax.ops import partition
    from vlm_jax.program import evaluate, sharding

    mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
    rows = sharding.rows_of_process(mesh, 8)
    for name, (_, _, predictor) in shared.SYSTEMS.items():
        task, host_params, batch = shared.made(name)
        shardings = sharding.of_params(mesh, task.sharding_rules, host_params)
        params = jax.tree.map(
            lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i, x=x: x[i]),
            host_params,
            shardings,
        )
        mine = {key: x[rows] for key, x in batch.items()}
        for layout in ("training", "inference"):
            if layout == "inference":
                params = evaluate.for_inference(task, mesh, params)
                shardings = jax.tree.map(lambda x: x.sharding, params)
            placed = sharding.place_batch(mesh, mine, rows, 8)
            for key in ("score", predictor):
                predict = jax.jit(
                    task.predict[key],
                    in_shardings=(
                        shardings,
                        sharding.of_batch(mesh),
                        sharding.replicated(mesh),
                    ),
                    out_shardings=sharding.replicated(mesh),
                )
                with partition.use_mesh(mesh):
                    found = predict(params, placed, jax.random.key(0))
                if rank == 0:
                    arrays = {output: np.asarray(x) for output, x in found.items()}
                    np.savez(f"{folder}/{name}_{key}_{layout}.npz", **arrays)
    print("predicted", jax.process_count(), len(jax.devices()))
