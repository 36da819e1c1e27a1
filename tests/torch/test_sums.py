"""The composed update, the Gram matrix and the scores of a pool's records against gradients written out one by one."""

import pytest

from ftw import Dense, Diagonal, OuterProduct, Rows, Scale, Sum

torch = pytest.importorskip("torch")
pool_module = pytest.importorskip("ftw_torch.records.pool")
stream_module = pytest.importorskip("ftw_torch.step.stream")

SHAPES = {"matrix": (5, 4), "table": (7, 4), "twice": (5, 4), "gain": (6,), "shift": (3,), "number": (), "unused": (2,)}


def records(n, t, dtype, generator):
    """Return records of n samples, and their gradients written out in float64, (n, *shape)."""

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    a, b, c, e = draw(n, t, 4), draw(n, t, 5), draw(n, t, 4), draw(n, t, 5)
    rows, r = torch.randint(0, 7, (n, t), generator=generator), draw(n, t, 4)
    found = {
        "matrix": OuterProduct(a, b),
        "table": Rows(rows, r, 7),
        "twice": Sum((OuterProduct(a, b), OuterProduct(c, e))),
        "gain": Dense(draw(n, 6)),
        "shift": Dense(draw(n, 3)),
        "number": Dense(draw(n)),
    }
    table = torch.zeros(n, 7, 4, dtype=torch.float64)
    for i in range(n):
        for j in range(t):
            table[i, rows[i, j]] += r[i, j].double()
    matrix = torch.einsum("nto,nti->noi", b.double(), a.double())
    more = torch.einsum("nto,nti->noi", e.double(), c.double())
    dense = {name: found[name].grads.double() for name in ("gain", "shift", "number")}
    return found, {"matrix": matrix, "table": table, "twice": matrix + more, **dense}


def pool_of(dtype, sizes=(3, 4), t=3):
    generator = torch.Generator().manual_seed(0)
    pieces = [records(n, t, dtype, generator) for n in sizes]
    parameters = {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
    whole = {name: torch.cat([grads[name] for _, grads in pieces]) for name in pieces[0][1]}
    return pool_module.Pool(parameters, [found for found, _ in pieces], sizes), whole, generator


def operators(generator):
    values = {
        name: Diagonal(torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1)
        for name, shape in SHAPES.items()
        if name not in ("shift", "number")
    }
    return {**values, "shift": Scale(0.3), "number": Scale(torch.tensor(2.0, dtype=torch.float64))}


def weighed(operator, g):
    return g * (operator.values.double() if isinstance(operator, Diagonal) else float(operator.value))


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
@pytest.mark.parametrize("sizes", [(7,), (3, 4)])
@pytest.mark.parametrize(
    ("indices", "weights"),
    [([5, 0, 2], [0.5, 0.2, 0.3]), (range(7), [1 / 7] * 7), ([1, 6], [0.5, 0.5]), ([4, 3], [1.0, 0.0])],
)
def test_update_is_the_weighted_sum(dtype, tol, sizes, indices, weights):
    pool, grads, _ = pool_of(dtype, sizes)
    update = pool.combine(indices, weights)
    assert set(update) == set(grads)
    for name, g in grads.items():
        want = sum(w * g[i] for i, w in zip(indices, weights, strict=True))
        torch.testing.assert_close(update[name].double(), want, rtol=tol, atol=tol * float(g.abs().max()))


def test_a_sample_of_zero_weight_does_not_enter():
    pool, grads, _ = pool_of(torch.float64)
    for piece in pool.pieces:
        piece["gain"].grads[0] = torch.nan
        piece["matrix"].inputs[0] = torch.nan
    update = pool.combine([0, 1, 3], [0.0, 1.0, 0.0])
    torch.testing.assert_close(update["gain"], grads["gain"][1])
    torch.testing.assert_close(update["matrix"], grads["matrix"][1])


@pytest.mark.parametrize("sizes", [(7,), (3, 4)])
@pytest.mark.parametrize("indices", [None, [6, 0, 4, 1]])
def test_products_of_some_samples_in_any_order(sizes, indices):
    pool, grads, generator = pool_of(torch.float64, sizes)
    P = operators(generator)
    direction = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    which = list(range(7)) if indices is None else indices
    flat = torch.cat([g[which].reshape(len(which), -1) for g in grads.values()], 1)
    response = torch.cat([weighed(P[name], g[which]).reshape(len(which), -1) for name, g in grads.items()], 1)
    goal = torch.cat([direction[name].reshape(-1) for name in grads])
    places = None if indices is None else torch.tensor(indices)
    torch.testing.assert_close(pool.gram(P, places).double(), flat @ response.T)
    torch.testing.assert_close(pool.scores(direction, places), flat @ goal)
    if indices is None:
        torch.testing.assert_close(pool.lengths(P).double(), (flat * response).sum(1))


def test_scores_of_records_as_they_arrive_one_of_them_twice():
    pool, grads, generator = pool_of(torch.float64, (7,))
    P = operators(generator)
    target = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    stream = stream_module.Stream(target, P)
    for name, record in [*pool.pieces[0].items(), ("gain", pool.pieces[0]["gain"])]:
        assert stream(name, record) is not None
    want = sum((weighed(P[name], g) * target[name]).reshape(7, -1).sum(1) for name, g in grads.items())
    want += (weighed(P["gain"], grads["gain"]) * target["gain"]).sum(1)
    for _ in range(2):  # however often they are asked for
        torch.testing.assert_close(stream.scores.double(), want)
