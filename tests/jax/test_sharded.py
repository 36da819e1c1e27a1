"""Parameters, optimizer state and pool sharded over eight virtual devices, by sharding alone: the same step."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
import ftw_jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

def loss(params, example):
    x, y = example
    return jnp.mean((params["down"] @ jnp.tanh(params["up"] @ x) - y) ** 2)

keys = jax.random.split(jax.random.PRNGKey(0), 6)
params = {"up": jax.random.normal(keys[0], (128, 64)) / 8, "down": jax.random.normal(keys[1], (64, 128)) / 8}
batch = lambda i, n: (jax.random.normal(keys[i], (n, 64)), jax.random.normal(keys[i + 1], (n, 64)))
pool, target, tx = batch(2, 32), batch(4, 8), optax.adam(1e-2)
state = tx.init(params)
grads = jax.grad(lambda p: jnp.mean(jax.vmap(lambda e: loss(p, e))(pool)))(params)
update, state = tx.update(grads, state, params)
params = optax.apply_updates(params, update)

select = ftw_jax.filter_then_weight(loss, tx, keep=4, guard=0.0, **json.loads(sys.argv[1]))
mesh = Mesh(np.array(jax.devices()), ("x",))
rows, everywhere = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
given = (params, state, pool, target)
placed = jax.tree.map(lambda x: jax.device_put(x, rows if x.ndim else everywhere), given)
whole = jax.jit(select).lower(*given).compile()
cut = jax.jit(select, out_shardings=(jax.tree.map(lambda _: rows, params), None)).lower(*placed).compile()
(g, chosen), (h, again) = whole(*given), cut(*placed)
memory = [(m.argument_size_in_bytes, m.output_size_in_bytes, m.temp_size_in_bytes) for m in
          (whole.memory_analysis(), cut.memory_analysis())]
error = max(float(jnp.linalg.norm(g[n] - h[n]) / jnp.linalg.norm(g[n])) for n in g)
shards = [h[n].addressable_shards[0].data.size * 8 == g[n].size for n in g]
print(json.dumps([chosen.indices.tolist(), again.indices.tolist(), error, len(jax.devices()), shards, memory]))
"""

FORWARD = {"score": "forward", "filter": "top_k", "weight": "uniform"}


@pytest.mark.parametrize("options", [FORWARD, pytest.param({}, marks=pytest.mark.slow)], ids=["forward", "matching"])
def test_shards_choose_and_step_as_the_whole(options):
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(options)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    chosen, again, error, devices, shards, memory = json.loads(run.stdout.splitlines()[-1])
    assert devices == 8
    assert chosen == again
    assert error < 1e-5
    assert all(shards)
    (given, returned, scratch), (own, kept, room) = memory
    assert own < given / 8 + 64  # parameters, state and batches: a device has its eighth
    assert kept < returned / 8 + 512  # the gradients too; the selection is everywhere
    assert room < scratch  # XLA gathers a matrix where it is multiplied
