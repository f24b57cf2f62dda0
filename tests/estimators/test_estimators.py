"""Interface of all gradient estimators: values, shapes, dtypes, errors, compilation, and discrete latents.

Their gradients are tested in the other files: always against an enumerated or integrated gradient, never against
another library.
"""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Gamma,
    Independent,
    Normal,
    OneHotCategorical,
    Poisson,
)

from estimator_cases import (
    LOGITS,
    Critic,
    K,
    choice,
    coins,
    square,
)
from levin import estimators
from levin.estimators import (
    ARM,
    ARMS,
    LAX,
    REBAR,
    RELAX,
    DecoupledStraightThrough,
    Dice,
    DisARM,
    Exact,
    GumbelRao,
    GumbelSoftmax,
    LeaveOneOut,
    MeasureValued,
    MovingAverage,
    OptimalConstant,
    ReinMax,
    Reparameterized,
    ScoreFunction,
    SelfCritical,
    StraightThrough,
    SumAndSample,
    UnorderedSet,
    WithoutReplacement,
)
from levin.estimators.latent import DiscreteLatent

# --- the interface of every estimator


EVERY = {
    "Exact": (Exact, choice),
    "ScoreFunction": (ScoreFunction, choice),
    "MovingAverage": (MovingAverage, choice),
    "SelfCritical": (SelfCritical, choice),
    "LeaveOneOut": (lambda: LeaveOneOut(4), choice),
    "OptimalConstant": (lambda: OptimalConstant(4), choice),
    "Dice": (Dice, choice),
    "Reparameterized": (lambda: Reparameterized(2), lambda leaf: Independent(Normal(leaf, 1.0), 1)),
    "StraightThrough": (StraightThrough, choice),
    "DecoupledStraightThrough": (DecoupledStraightThrough, choice),
    "GumbelSoftmax": (lambda: GumbelSoftmax(0.5), choice),
    "GumbelRao": (GumbelRao, choice),
    "ReinMax": (ReinMax, choice),
    "SumAndSample": (lambda: SumAndSample(3), choice),
    "UnorderedSet": (lambda: UnorderedSet(3), choice),
    "WithoutReplacement": (lambda: WithoutReplacement(4), choice),
    "ARM": (ARM, coins),
    "DisARM": (DisARM, coins),
    "ARMS": (lambda: ARMS(4), coins),
    "REBAR": (REBAR, choice),
    "RELAX": (lambda: RELAX(Critic(K)), choice),
    "LAX": (lambda: LAX(Critic(K)), lambda leaf: Independent(Normal(leaf, 1.0), 1)),
    "MeasureValued": (MeasureValued, choice),
}


def test_costs_may_be_integers_and_not_differentiable():
    for estimator in (LeaveOneOut(2), ScoreFunction(), Exact(), SelfCritical(), RELAX(Critic(K))):
        leaf = LOGITS.expand(4, K).clone().requires_grad_()
        surrogate = estimator(choice(leaf), lambda z: torch.from_numpy(z.detach().numpy().argmax(-1)))
        assert torch.autograd.grad(surrogate.sum(), leaf)[0].isfinite().all()
    loc = torch.zeros(3, requires_grad=True)
    surrogate = SelfCritical()(Normal(loc, 1.0), lambda x: torch.from_numpy(x.numpy() ** 2))
    assert torch.autograd.grad(surrogate.sum(), loc)[0].shape == (3,)
    with pytest.raises(TypeError, match="use RELAX"):
        REBAR()(choice(LOGITS), lambda z: torch.ones(3))
    assert REBAR(eta=0.0)(choice(LOGITS.clone().requires_grad_()), lambda z: torch.ones(3)).requires_grad


def test_a_large_score_does_not_round_the_value():
    torch.set_default_dtype(torch.float32)
    dist = Independent(choice(torch.randn(32, 32)), 1)
    draws = ScoreFunction().sample(dist)
    cost = torch.tensor([1000.3])
    assert torch.equal(ScoreFunction().surrogate(draws, cost), cost[0])


@pytest.mark.parametrize("name", [name for name, (_, family) in EVERY.items() if family is choice])
def test_masked_choices_give_finite_gradients(name):
    """Masked choices have logits of -inf."""
    leaf = torch.tensor([[0.3, -math.inf, 0.5, -math.inf, 1.0]] * 20).requires_grad_()
    surrogate = EVERY[name][0]()(choice(leaf), square)
    assert surrogate.isfinite().all()
    assert torch.autograd.grad(surrogate.sum(), leaf)[0].isfinite().all()


def test_every_exported_estimator_is_tested():
    exported = {name for name in estimators.__all__ if isinstance(getattr(estimators, name), type)}
    assert exported - {"Draws", "Estimator", "StochasticGraph"} == EVERY.keys()


@pytest.mark.parametrize("name", EVERY)
def test_other_parameters_get_the_gradient_of_the_mean_cost(name):
    """The value is the weighted cost, whose gradient in other parameters (a decoder's) is the ordinary one."""
    make_estimator, family = EVERY[name]
    estimator, decoder = make_estimator(), torch.randn(K, generator=torch.Generator().manual_seed(0)).requires_grad_()
    leaf = torch.randn(7, 2, K, generator=torch.Generator().manual_seed(1)).requires_grad_()
    again = copy.deepcopy(estimator)
    torch.manual_seed(0)
    draws = estimator.sample(family(leaf))
    assert draws.value.shape[1:] == (7, 2, K)
    cost = (draws.value * decoder).sum(-1).square()
    surrogate = estimator.surrogate(draws, cost)
    weight = torch.full_like(cost, 1 / len(cost)) if draws.weight is None else draws.weight
    assert surrogate.shape == (7, 2)
    torch.testing.assert_close(surrogate, (weight * cost).sum(0), check_dtype=False)
    with_graph = torch.autograd.grad(surrogate.sum(), decoder, retain_graph=True)[0]
    torch.testing.assert_close(with_graph, torch.autograd.grad((weight * cost).sum(), decoder, retain_graph=True)[0])
    torch.manual_seed(0)  # calling the estimator does both steps
    torch.testing.assert_close(again(family(leaf), lambda z: (z * decoder).sum(-1).square()), surrogate)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_dtypes_and_shapes(name, dtype, shape):
    torch.set_default_dtype(dtype)
    make_estimator, family = EVERY[name]
    leaf = torch.randn(*shape, K, dtype=dtype).requires_grad_()
    surrogate = make_estimator()(family(leaf), lambda z: z.square().sum(-1) + z[..., 0])
    assert surrogate.shape == shape
    assert surrogate.dtype == dtype
    (gradient,) = torch.autograd.grad(surrogate.sum(), leaf)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_extreme_parameters_stay_finite(name):
    make_estimator, family = EVERY[name]
    if "Normal" in str(type(family(torch.zeros(2, K)))):
        return
    torch.set_default_dtype(torch.float32)
    leaf = torch.tensor([[60.0, -60.0, 0.0, -200.0, 200.0]] * 50).requires_grad_()
    surrogate = make_estimator()(family(leaf), lambda z: z.square().sum(-1) + z[..., 0])
    assert surrogate.isfinite().all()
    assert torch.autograd.grad(surrogate.sum(), leaf)[0].isfinite().all()


REFUSED = [
    (ARM(), Normal(0.0, 1.0), "ARM is for Bernoulli, not for Normal: use LeaveOneOut or UnorderedSet for categorical"),
    (DisARM(), OneHotCategorical(logits=torch.zeros(3)), "DisARM is for Bernoulli, not for OneHotCategorical"),
    (
        Reparameterized(),
        Categorical(logits=torch.zeros(3)),
        "no path through a sample of Categorical, it has no rsample: use ScoreFunction",
    ),
    (Reparameterized(), Poisson(torch.ones(3)), "no path through a sample of Poisson"),
    (StraightThrough(), Categorical(logits=torch.zeros(3)), "a OneHotCategorical instead of a Categorical"),
    (Exact(), Poisson(torch.ones(3)), "Exact is for Bernoulli and Categorical and OneHotCategorical, not for Poisson"),
    (MeasureValued(), Gamma(1.0, 1.0), "MeasureValued is for"),
    (MeasureValued(), Normal(0.0, torch.ones((), requires_grad=True)), "detach its scale"),
    (LAX(nn.Linear(1, 1)), Bernoulli(logits=torch.zeros(2)), "LAX is for Normal, not for Bernoulli: use RELAX"),
]


@pytest.mark.parametrize(("estimator", "dist", "message"), REFUSED, ids=lambda each: type(each).__name__)
def test_an_unsupported_distribution_is_a_type_error(estimator, dist, message):
    with pytest.raises(TypeError, match=message):
        estimator.sample(dist)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LeaveOneOut(1), "LeaveOneOut needs 2 or more samples, got 1"),
        (lambda: ScoreFunction(0), "ScoreFunction needs 1 or more samples"),
        (lambda: GumbelSoftmax(0.0), "tau is a temperature and must be above 0, got 0"),
        (lambda: REBAR(tau=-1.0), "tau is a temperature and must be above 0"),
        (lambda: MovingAverage(1.0), r"decay must be in \[0, 1\), got 1"),
        (lambda: DiscreteLatent(torch.zeros(2, 3), unimix=1.0), r"unimix must be in \[0, 1\), got 1"),
        (
            lambda: Exact()(coins(torch.zeros(15)), lambda z: z.sum(-1)),
            r"2 \*\* 15 values are too many to enumerate, the limit is 10000",
        ),
        (lambda: GumbelRao(rao=0), "GumbelRao needs 1 or more samples, got 0"),
        (lambda: DiscreteLatent(torch.zeros(2, 3), LeaveOneOut(2)), "a relaxation with num=1"),
        (lambda: DiscreteLatent(torch.zeros(2, 3), ReinMax(num=4)), "a relaxation with num=1"),
        (
            lambda: LeaveOneOut(4)(choice(LOGITS.expand(4, K)), lambda z: z.sum((-1, -2))),
            r"one value per point, shape \(4, 4\), but has shape \(4,\)",
        ),
        (
            lambda: ScoreFunction(baseline=torch.zeros(4, 1))(choice(LOGITS.expand(4, K)), lambda z: z.sum(-1)),
            r"the batch shape of the costs, got \(4, 1\) for costs of shape \(1, 4\)",
        ),
        (
            lambda: RELAX(nn.Linear(K, 1))(choice(LOGITS.expand(4, K)), lambda z: z.sum(-1)),
            r"the critic must return shape \(4,\) for",
        ),
        (
            lambda: LeaveOneOut(4).surrogate(LeaveOneOut(4).sample(choice(LOGITS)), torch.zeros(3)),
            r"one value per point, shape \(4,\), but has shape \(3,\)",
        ),
    ],
)
def test_invalid_values_are_value_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"REBAR", "RELAX", "LAX"}))  # these call autograd inside
def test_compiled_in_one_graph(name):
    """Compiled and eager gradients are equal for the same samples."""
    make_estimator, family = EVERY[name]
    torch.compiler.reset()
    eager, traced = make_estimator(), make_estimator()
    decoder = torch.randn(K)

    def loss(estimator, leaf):
        return estimator(family(leaf), lambda z: (z * decoder).sum(-1).square()).sum()

    compiled = torch.compile(lambda leaf: loss(traced, leaf), fullgraph=True, backend="aot_eager")
    leaf = torch.randn(6, K).requires_grad_()
    for seed in range(2):
        torch.manual_seed(seed)
        expected = torch.autograd.grad(loss(eager, leaf), leaf)[0]
        torch.manual_seed(seed)
        torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], expected)


# --- latents


def test_a_latent_in_a_torchrl_module_has_a_gradient():
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule

    logits = torch.randn(4, 2, K).requires_grad_()
    for estimator in (None, ReinMax(), GumbelRao(), GumbelSoftmax(hard=True)):
        module = ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["z"],
            distribution_class=DiscreteLatent,
            distribution_kwargs={"estimator": estimator, "unimix": 0.01},
            default_interaction_type="random",
        )
        z = module(TensorDict({"logits": logits}, batch_size=4))["z"]
        assert z.shape == (4, 2, K)
        torch.testing.assert_close(z.sum(-1), torch.ones(4, 2))
        assert ((z - z.round()).abs() < 1e-12).all()
        gradient = torch.autograd.grad((z * torch.randn(K)).sum(), logits)[0]
        assert (gradient.abs() > 0).all()


def test_unimix_mixes_a_uniform_distribution_in():
    latent = DiscreteLatent(torch.tensor([[100.0, 0.0, 0.0, 0.0]]), unimix=0.04)
    torch.testing.assert_close(latent.logits.exp(), torch.tensor([[0.97, 0.01, 0.01, 0.01]]))
    assert latent.rsample((3, 2)).shape == (3, 2, 1, 4)
    assert not latent.sample().requires_grad
    assert latent.expand((3, 2)).batch_shape == (3, 2)
    assert latent.mode.tolist() == [[1, 0, 0, 0]]
    assert latent.log_prob(latent.mode).item() == pytest.approx(math.log(0.97))
