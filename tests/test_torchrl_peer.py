"""Values and gradients are those of TorchRL, where it is installed.

`pip install -e ".[peer-torch]"` installs it. Each case calls both libraries with the
same random arrays. The losses of TorchRL take networks: those here pass on what the
case gives. Where the two differ on purpose, the case has the reason, and `as_torchrl`
turns one result into the other, so that nothing else differs.

The differences are of three kinds. Of two ways to write a formula TorchRL has the
other: a mean over components for a sum (TD3+BC, RND), the logarithm of a temperature
for itself (SAC), a share for a number (effective sample size), the next states as well
as these (the temperature of REDQ). A moving average starts elsewhere (PopArt, the range
of returns). Or TorchRL does not have the formula of the paper: in CISPO, the KL of
tokens, the controller of a KL coefficient, CQL of continuous actions, REDQ with all of
its critics, n-step transitions, PUCT without visits, the gradient of a masked entropy.
"""

import types
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims as rl

torch = pytest.importorskip("torch")
pytest.importorskip("torchrl")

data = pytest.importorskip("torchrl.data")
llm = pytest.importorskip("torchrl.objectives.llm")
modules = pytest.importorskip("torchrl.modules")
nn = pytest.importorskip("tensordict.nn")
objectives = pytest.importorskip("torchrl.objectives")
tensordict = pytest.importorskip("tensordict")
transforms = pytest.importorskip("torchrl.envs.transforms")
values = pytest.importorskip("torchrl.objectives.value.functional")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("ordinary_promotion", "quick_to_compile"),
]

STEPS, BATCH, ACTIONS, ATOMS, CRITICS = 7, 6, 3, 5, 3
GAMMA, LAMBDA, ALPHA = 0.9, 0.8, 0.3
KEY = jax.random.key(0)
BOUND = 0.3  # how much likelier an action may become


class Case(NamedTuple):
    """One formula in both libraries, of the same arguments."""

    draw: Callable  # the arguments
    ours: Callable
    theirs: Callable
    to: list[str]  # of which arguments gradients are compared
    differs: str  # what TorchRL does instead, if so: then `ours` takes `as_torchrl`


CASES: dict[str, Case] = {}


def case(draw, theirs, to="", differs=""):
    def add(ours):
        CASES[ours.__name__] = Case(draw, ours, theirs, to.split(), differs)
        return ours

    return add


class Draws:
    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def f(self, *shape):
        return np.float32(self.rng.normal(size=shape))

    def i(self, below, *shape):
        return self.rng.integers(below, size=shape)

    def b(self, probability, *shape):
        return self.rng.uniform(size=shape) < probability


def weights(x):
    size = int(np.prod(x.shape))
    return np.float32(1 + np.arange(size) / 7).reshape(x.shape)


def in_jax(fn, to, given):
    """The results, and the gradient of a sum of them that tells them apart."""

    def results(moved):
        return jax.tree.leaves(fn(types.SimpleNamespace(**given | moved)))

    out, pull = jax.vjp(results, {name: given[name] for name in to})
    gradients = pull([np.asarray(weights(x), x.dtype) for x in out])[0]
    return out + [gradients[name] for name in to]


def in_torch(fn, to, given):
    x = types.SimpleNamespace(**{k: torch.tensor(v) for k, v in given.items()})
    moved = [getattr(x, name).requires_grad_() for name in to]
    out = fn(x)
    out = [*out] if isinstance(out, tuple) else [out]
    total = sum((y * torch.tensor(weights(y))).sum() for y in out)
    settings: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(total, moved, **settings) if to else ()
    return [y.detach().numpy() for y in (*out, *gradients)]


def compared(case, **settings):
    """For some random arguments, which of the results are those of TorchRL."""
    ours = jax.jit(
        lambda given: in_jax(lambda x: case.ours(x, **settings), case.to, given)
    )
    for given in map(case.draw, map(Draws, range(5))):
        pairs = zip(ours(given), in_torch(case.theirs, case.to, given), strict=True)
        near = {"rtol": 2e-4, "atol": 2e-5, "equal_nan": True}
        yield [np.allclose(x, y, **near) for x, y in pairs]


# Returns and advantages


def ends(x, length):
    terminated = x.b(0.2, length)
    return {
        "terminated": terminated,
        "truncated": x.b(0.2, length) & ~terminated,
        "discount_t": np.float32(GAMMA * ~terminated),
    }


def trajectory(x):
    """The value reached is that of the next state, unless the episode is cut."""
    v, end = x.f(STEPS + 1), ends(x, STEPS)
    v_t = np.where(end["truncated"], x.f(STEPS), v[1:])
    rest = {"r_t": x.f(STEPS), "log_pi": x.f(STEPS), "log_mu": x.f(STEPS)}
    return end | rest | {"v_tm1": v[:-1], "v_t": v_t}


def column(x):
    return x[..., None]


def steps(x, v_tm1=False):
    """What functions of a trajectory take."""
    of_state = {"state_value": column(x.v_tm1)} if v_tm1 else {}
    return of_state | {
        "next_state_value": column(x.v_t),
        "reward": column(x.r_t),
        "done": column(x.terminated | x.truncated),
        "terminated": column(x.terminated),
    }


def estimate(name, *settings, v_tm1=False):
    def theirs(x):
        out = getattr(values, name)(GAMMA, *settings, **steps(x, v_tm1))
        return tuple(y[..., 0] for y in (out if isinstance(out, tuple) else (out,)))

    return theirs


def lambda_returns(x, lambda_):
    return rl.lambda_returns(
        x.r_t, x.discount_t, x.v_t, lambda_, truncation_t=x.truncated
    )


TD_0 = lambda x: values.td0_return_estimate(
    GAMMA, column(x.v_t), column(x.r_t), column(x.terminated)
)
REWARD_TO_GO = lambda x: values.reward2go(
    column(x.r_t), column(x.terminated | x.truncated), GAMMA
)


@case(trajectory, lambda x: TD_0(x)[:, 0])
def returns_of_one_step(x):
    return lambda_returns(x, 0.0)


@case(trajectory, estimate("td1_return_estimate"))
def discounted_returns(x):
    return lambda_returns(x, 1.0)


@case(trajectory, estimate("td_lambda_return_estimate", LAMBDA))
def td_lambda(x):
    return lambda_returns(x, LAMBDA)


@case(trajectory, estimate("vec_td_lambda_return_estimate", LAMBDA))
def vectorized_td_lambda(x):
    return lambda_returns(x, LAMBDA)


@case(trajectory, estimate("td_lambda_advantage_estimate", LAMBDA, v_tm1=True))
def td_lambda_advantages(x):
    return lambda_returns(x, LAMBDA) - x.v_tm1


@case(trajectory, lambda x: REWARD_TO_GO(x)[:, 0])
def rewards_to_go(x):
    end = x.terminated | x.truncated
    return rl.rewards_to_go(x.r_t, jnp.full_like(x.r_t, GAMMA), truncation_t=end)


def advantages(x):
    given = x.v_tm1, x.r_t, x.discount_t, x.v_t, LAMBDA
    adv = rl.generalized_advantage_estimation(*given, truncation_t=x.truncated)
    return adv, adv + x.v_tm1


GAE = "generalized_advantage_estimate"


@case(trajectory, estimate(GAE, LAMBDA, v_tm1=True))
def gae(x):
    return advantages(x)


@case(trajectory, estimate(f"vec_{GAE}", LAMBDA, v_tm1=True))
def vectorized_gae(x):
    return advantages(x)


def vtrace_in_torchrl(x):
    policies = {"log_pi": column(x.log_pi), "log_mu": column(x.log_mu)}
    settings = steps(x, True) | policies | {"rho_thresh": 1.3}
    return torch.stack(values.vtrace_advantage_estimate(GAMMA, **settings))[..., 0]


@case(trajectory, vtrace_in_torchrl)
def vtrace(x):
    rho_tm1 = jnp.exp(x.log_pi - x.log_mu)
    out = rl.vtrace_td_error_and_advantage(
        *(x.v_tm1, x.v_t, x.r_t, x.discount_t, rho_tm1),
        clip_rho_threshold=1.3,
        clip_pg_rho_threshold=1.3,
        truncation_t=x.truncated,
    )
    return jnp.stack([out.pg_advantage, out.errors + x.v_tm1])


# Actor-critics of continuous actions


class Given(torch.distributions.Distribution):
    """Always one action, with a log-probability that is given."""

    arg_constraints: ClassVar = {}
    has_rsample = True

    def __init__(self, loc, log_p):
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)
        self.loc, self.log_p = loc, log_p

    def rsample(self, shape=()):
        return self.loc.expand(*shape, *self.loc.shape)

    def sample(self, shape=()):
        return self.rsample(shape)

    def log_prob(self, action):
        return self.log_p.expand(action.shape[:-1])


class Critic(torch.nn.Module):
    """What an observation has for one critic, plus the components of the action."""

    def __init__(self, index):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(CRITICS)[index].clone())

    def forward(self, observation, action):
        q = observation[..., ACTIONS + 1 : -1] * self.weight
        return q.sum(-1, keepdim=True) + action.sum(-1, keepdim=True)


class Quantiles(Critic):
    def forward(self, observation, action):
        return super().forward(observation, action) * torch.linspace(-1, 2, ATOMS)


def transitions(x):
    of_state = lambda t: {
        f"pi_{t}": x.f(BATCH, ACTIONS),
        f"log_prob_{t}": x.f(BATCH),
        f"q_{t}": x.f(CRITICS, BATCH),
        f"v_{t}": x.f(BATCH),
    }
    taken = {"a": x.f(BATCH, ACTIONS), "r_t": x.f(BATCH)}
    return of_state("tm1") | of_state("t") | taken | ends(x, BATCH)


def batch(x, action, now, later):
    done = column(x.terminated | x.truncated)
    flags = {"terminated": column(x.terminated), "done": done}
    after = later | flags | {"reward": column(x.r_t)}
    return tensordict.TensorDict(now | {"action": action, "next": after}, [BATCH])


def network(fn, of, to):
    return nn.TensorDictModule(fn, in_keys=of, out_keys=to)


def policy(of, parts, distribution, fn, log_prob=True):
    settings = {"distribution_class": distribution, "return_log_prob": log_prob}
    drawn = nn.ProbabilisticTensorDictModule(parts, ["action"], **settings)
    return nn.ProbabilisticTensorDictSequential(network(fn, [of], parts), drawn)


def actor():
    split = lambda o: (o[..., :ACTIONS], o[..., ACTIONS])
    return policy("observation", ["loc", "log_p"], Given, split)


def deterministic_actor():
    return network(lambda o: o[..., :ACTIONS], ["observation"], ["action"])


def value_network():
    return network(lambda o: o[..., -1:], ["observation"], ["state_value"])


def critics(kind=Critic):
    of, to = ["observation", "action"], ["state_action_value"]
    return [network(kind(i), of, to) for i in range(CRITICS)]


def outputs(module, given, names, bootstraps=True):
    if bootstraps:
        module.make_value_estimator(gamma=GAMMA)
    out = module(given)
    return tuple(out[name].squeeze() for name in names)


def observed(x):
    now = x.pi_tm1, column(x.log_prob_tm1), x.q_tm1.T, column(x.v_tm1)
    later = x.pi_t, column(x.log_prob_t), x.q_t.T, column(x.v_t)
    put = lambda parts: {"observation": torch.cat(parts, -1)}
    return batch(x, x.a, put(now), put(later))


def of_critics(kind, *networks, names=("loss_qvalue", "loss_actor"), **settings):
    """Losses of a module of actors and critics."""

    def theirs(x):
        made = [network() for network in networks]
        shared = {"num_qvalue_nets": CRITICS} if kind != "CQLLoss" else {}
        module = getattr(objectives, kind)(*made, **shared, **settings)
        return outputs(module, observed(x), names)

    return theirs


L2 = {"loss_function": "l2"}
SOFT = {"alpha_init": ALPHA, "target_entropy": -3.0}
EXACT = L2 | {"bounds": (-99.0, 99.0), "policy_noise": 0.0}
SAC = "q_tm1 log_prob_tm1 pi_tm1"
# That of a temperature to its logarithm, which some losses have in its place.
LOG_RATIO = float(np.log(ALPHA) / ALPHA)
LOG_TEMPERATURE = "it has the logarithm of the temperature in its place"
COMPONENTS = "it takes the mean over components"


def q_of(q, action):
    return q + action.sum(-1)


def squares(errors):
    """The mean square of each critic's errors, summed."""
    return (errors**2).mean(-1).sum()


@case(transitions, of_critics("SACLoss", actor, critics, **L2, **SOFT), SAC)
def sac(x):
    q_tm1, q_t = q_of(x.q_tm1, x.a), q_of(x.q_t, x.pi_t)
    given = q_tm1, x.r_t, x.discount_t, q_t, x.log_prob_t
    errors = rl.sac_critic_errors(*given, temperature=ALPHA)
    q = q_of(x.q_tm1, x.pi_tm1)
    return squares(errors), rl.sac_actor_loss(x.log_prob_tm1, q, temperature=ALPHA)


@case(
    transitions,
    of_critics("SACLoss", actor, critics, names=["loss_alpha"], **SOFT),
    differs=LOG_TEMPERATURE,
)
def sac_temperature(x, as_torchrl=False):
    loss = rl.sac_temperature_loss(ALPHA, x.log_prob_tm1, target_entropy=-3.0)
    return loss * LOG_RATIO if as_torchrl else loss


@case(
    transitions,
    of_critics("REDQLoss", actor, critics, names=["loss_actor"], **L2, **SOFT),
    SAC,
)
def redq_policy(x):
    mean = q_of(x.q_tm1, x.pi_tm1).mean(0, keepdims=True)
    return rl.sac_actor_loss(x.log_prob_tm1, mean, temperature=ALPHA)


@case(
    transitions,
    of_critics("REDQLoss", actor, critics, names=["loss_alpha"], **SOFT),
    "log_prob_tm1",
    differs="it counts the next states as well",
)
def redq_temperature(x, as_torchrl=False):
    both = jnp.concatenate([x.log_prob_tm1, x.log_prob_t])
    log_prob_t = both if as_torchrl else x.log_prob_tm1
    return rl.sac_temperature_loss(ALPHA, log_prob_t, target_entropy=-3.0)


@case(
    transitions,
    of_critics(
        "TQCLoss",
        actor,
        lambda: critics(Quantiles),
        top_quantiles_to_drop_per_net=1,
        **SOFT,
    ),
    SAC,
)
def tqc(x):
    scale = jnp.linspace(-1, 2, ATOMS, dtype=np.float32)
    quantiles = lambda q, action: column(q_of(q, action)) * scale
    targets = jax.vmap(
        lambda r_t, discount_t, dist_t, log_prob_t: rl.truncated_quantile_targets(
            *(r_t, discount_t, dist_t, 1), temperature=ALPHA, log_prob_t=log_prob_t
        ),
        (0, 0, 1, 0),
    )(x.r_t, x.discount_t, quantiles(x.q_t, x.pi_t), x.log_prob_t)
    levels = (jnp.arange(ATOMS, dtype=np.float32) + 0.5) / ATOMS
    of_step = jax.vmap(rl.quantile_huber_loss, (0, None, 0))
    of_critic = jax.vmap(of_step, (0, None, None))
    loss = of_critic(quantiles(x.q_tm1, x.a), levels, targets).sum(0).mean() / ATOMS
    q = quantiles(x.q_tm1, x.pi_tm1).mean((0, 2))[None]
    return loss, rl.sac_actor_loss(x.log_prob_tm1, q, temperature=ALPHA)


@case(
    transitions,
    of_critics("TD3Loss", deterministic_actor, critics, **EXACT),
    "q_tm1 pi_tm1",
)
def td3(x):
    q_tm1, q_t = q_of(x.q_tm1, x.a), q_of(x.q_t, x.pi_t)
    errors = rl.clipped_double_q_learning(q_tm1, x.r_t, x.discount_t, q_t)
    return squares(errors), -q_of(x.q_tm1, x.pi_tm1)[0].mean()


@case(
    transitions,
    of_critics(
        "TD3BCLoss", deterministic_actor, critics, names=["loss_actor"], **EXACT
    ),
    "q_tm1 pi_tm1",
    differs=COMPONENTS,
)
def td3_bc(x, as_torchrl=False):
    components = ACTIONS if as_torchrl else 1
    given = q_of(x.q_tm1, x.pi_tm1)[0], x.pi_tm1, x.a
    return rl.td3_bc_actor_loss(*given, alpha=2.5 * components) / components


IQL = {"temperature": 3.0, "expectile": 0.7} | L2


@case(
    transitions,
    of_critics(
        "IQLLoss",
        actor,
        critics,
        value_network,
        names=["loss_value", "loss_actor"],
        **IQL,
    ),
    "v_tm1 log_prob_tm1",
)
def iql(x):
    q_t = q_of(x.q_tm1, x.a).min(0)
    settings = {"temperature": 1 / 3, "max_weight": 100.0}
    weight_t = rl.exponential_advantage_weights(q_t - x.v_tm1, **settings)
    cloning = rl.behaviour_cloning_loss(x.log_prob_tm1, weight_t=weight_t)
    return rl.iql_value_loss(x.v_tm1, q_t, expectile=0.7), cloning


@case(
    transitions,
    of_critics("IQLLoss", actor, critics, value_network, names=["loss_qvalue"], **IQL),
    "q_tm1",
)
def iql_critics(x):
    q_tm1 = q_of(x.q_tm1, x.a)
    return squares(rl.ensemble_td_learning(q_tm1, x.r_t, x.discount_t, x.v_t))


class Uniform(torch.distributions.Independent):
    def __init__(self, loc):
        one = torch.ones_like(loc)
        super().__init__(torch.distributions.Uniform(-one, one), 1)


class Values(Critic):
    """Critics to which all actions are alike."""

    def forward(self, observation, action):
        return super().forward(observation, 0 * action)


@case(
    transitions,
    of_critics(
        "CQLLoss",
        lambda: policy("observation", ["loc"], Uniform, lambda o: o[..., :ACTIONS]),
        lambda: critics(Values)[:2],
        names=["loss_cql"],
        action_spec=data.Bounded(-1.0, 1.0, (ACTIONS,)),
        num_random=4,
        **SOFT,
    ),
    "q_tm1",
    differs="it values the policy's next actions in the next states, and has no 1 / N",
)
def continuous_cql(x, as_torchrl=False):
    """Of as many uniform actions as of the policy, here and in the next state."""
    q, q_t = x.q_tm1[:2], jax.lax.stop_gradient(x.q_t[:2])
    q_samples = jnp.stack([q, q, q_t if as_torchrl else q], axis=-1)
    log_probs = jnp.full_like(q_samples, -ACTIONS * np.log(2))
    penalty = rl.continuous_cql_penalty(q, q_samples, log_probs, reduction="none")
    constant = np.log(3) if as_torchrl else 0
    return (penalty.mean(-1) + constant).sum()


@pytest.mark.parametrize("asked", [2, 3])
def test_redq_takes_the_minimum_of_some_critics(asked):
    """Where all three are asked for, TorchRL leaves one out."""
    given = transitions(Draws(0))
    x = types.SimpleNamespace(**{k: torch.tensor(v) for k, v in given.items()})
    x.log_prob_tm1.requires_grad_()
    settings = {"names": ["next.state_value"], "sub_sample_len": asked} | SOFT
    (soft_value,) = of_critics("REDQLoss", actor, critics, **settings)(x)
    theirs = soft_value.detach() + ALPHA * x.log_prob_t
    q_t = jnp.asarray(q_of(given["q_t"], given["pi_t"]))
    minimum = jax.jit(rl.random_subset_minimum, static_argnames="subset_size")
    ours = [minimum(key, q_t, subset_size=2) for key in jax.random.split(KEY, 20)]
    assert any(np.allclose(theirs, one, atol=1e-5) for one in ours)
    assert not np.allclose(theirs, minimum(KEY, q_t, subset_size=3), atol=1e-5)


# Finite actions


class Scaled(torch.nn.Module):
    """Values that are given, times weights, of which a target network has a copy."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.clone())

    def forward(self, given):
        return given * self.weight


def discrete(x):
    of_state = lambda t: {
        f"values_{t}": x.f(BATCH, ACTIONS),
        f"logits_{t}": x.f(BATCH, ACTIONS),
        f"dist_{t}": x.f(BATCH, ACTIONS, ATOMS),
    }
    taken = {"a_tm1": x.i(ACTIONS, BATCH), "r_t": x.f(BATCH)}
    return of_state("tm1") | of_state("t") | taken | ends(x, BATCH)


def discrete_batch(x):
    action = torch.nn.functional.one_hot(x.a_tm1, ACTIONS)
    now = {"given": x.logits_tm1, "values": x.values_tm1, "dist": x.dist_tm1}
    later = {"given": x.logits_t, "values": x.values_t, "dist": x.dist_t}
    return batch(x, action, now, later)


def of_values(kind, *names, online=(1.0, 1.0, 1.0), **settings):
    """Losses of a module of values, with a target network whose weights are one."""

    def theirs(x):
        net = Scaled(torch.ones(ACTIONS))
        value = modules.QValueActor(net, in_keys=["values"], action_space="one_hot")
        shared = L2 | {"delay_value": True, "action_space": "one_hot"}
        module = getattr(objectives, kind)(value, **shared, **settings)
        net.weight.data.copy_(torch.tensor(online))
        return outputs(module, discrete_batch(x), names)

    return theirs


ONLINE = (-1.0, 2.0, 0.5)


def q_errors(x):
    given = x.values_tm1, x.a_tm1, x.r_t, x.discount_t, x.values_t
    return jax.vmap(rl.q_learning)(*given)


@case(discrete, of_values("DQNLoss", "loss"), "values_tm1")
def dqn(x):
    return (q_errors(x) ** 2).mean()


@case(
    discrete,
    of_values("DQNLoss", "loss", online=ONLINE, double_dqn=True),
    "values_tm1",
)
def double_dqn(x):
    online, online_t = (jnp.float32(ONLINE) * q for q in (x.values_tm1, x.values_t))
    given = online, x.a_tm1, x.r_t, x.discount_t, x.values_t, online_t
    return (jax.vmap(rl.double_q_learning)(*given) ** 2).mean()


@case(discrete, of_values("DiscreteCQLLoss", "loss_qvalue", "loss_cql"), "values_tm1")
def discrete_cql(x):
    loss = rl.l2_loss(q_errors(x)).mean()
    return loss, rl.cql_penalty(x.values_tm1, x.a_tm1)


def c51_in_torchrl(x):
    log_softmax = lambda dist: dist.transpose(-1, -2).log_softmax(-2)
    value = modules.DistributionalQValueActor(
        network(log_softmax, ["dist"], ["action_value"]),
        spec=None,
        action_space="one_hot",
        support=torch.linspace(-2, 2, ATOMS),
        make_log_softmax=False,
    )
    module = objectives.DistributionalDQNLoss(value, gamma=GAMMA, delay_value=True)
    return outputs(module, discrete_batch(x), ["loss"], bootstraps=False)


@case(discrete, c51_in_torchrl, "dist_tm1")
def c51(x):
    atoms = jnp.linspace(-2, 2, ATOMS, dtype=np.float32)
    given = atoms, x.dist_tm1, x.a_tm1, x.r_t, x.discount_t, atoms, x.dist_t
    return jax.vmap(rl.categorical_q_learning, (None, 0, 0, 0, 0, None, 0))(
        *given
    ).mean()


def categorical_policy(distribution=torch.distributions.Categorical, **settings):
    return policy("given", ["logits"], distribution, lambda x: x, **settings)


def of_discrete_sac(*names):
    def theirs(x):
        module = objectives.DiscreteSACLoss(
            categorical_policy(modules.OneHotCategorical, log_prob=False),
            network(Scaled(torch.ones(())), ["values"], ["action_value"]),
            action_space="one_hot",
            num_actions=ACTIONS,
            **L2 | SOFT,
        )
        for params in module.qvalue_network_params, module.target_qvalue_network_params:
            for weight in params.values(True, True):
                weight.data.copy_(torch.tensor(TWO))
        return outputs(module, discrete_batch(x), names)

    return theirs


TWO = (1.0, -0.7)  # critics, as multiples of what is given


def two_critics(values):
    return jnp.float32(TWO)[:, None, None] * values


@case(discrete, of_discrete_sac("loss_qvalue"), "values_tm1")
def discrete_sac_critics(x):
    q_tm1, q_t = map(two_critics, (x.values_tm1, x.values_t))
    given = q_tm1, x.a_tm1, x.r_t, x.discount_t, q_t, x.logits_t
    return squares(rl.discrete_sac_critic_errors(*given, temperature=ALPHA))


@case(discrete, of_discrete_sac("loss_actor"), "logits_tm1")
def discrete_sac_policy(x):
    q = two_critics(x.values_tm1)
    return rl.discrete_sac_actor_loss(x.logits_tm1, q, temperature=ALPHA)


@case(discrete, of_discrete_sac("loss_alpha"), differs=LOG_TEMPERATURE)
def discrete_sac_temperature(x, as_torchrl=False):
    loss = rl.discrete_sac_temperature_loss(ALPHA, x.logits_tm1, target_entropy=-3.0)
    return loss * LOG_RATIO if as_torchrl else loss


# Policy gradients


def on_policy(x):
    logits = {"logits": x.f(BATCH, ACTIONS), "old_logits": x.f(BATCH, ACTIONS)}
    rest = {name: x.f(BATCH) for name in ("adv", "v", "old_v", "target")}
    return logits | rest | {"a": x.i(ACTIONS, BATCH)}


def of_policy(kind, *names, **settings):
    """Losses of a module of policies, and what else it has after its call."""

    def theirs(x):
        old = x.old_logits.log_softmax(-1).gather(-1, column(x.a))[..., 0]
        given = {
            "given": x.logits,
            "logits": x.old_logits,
            "v": column(x.v),
            "action": x.a,
            "action_log_prob": old,
            "advantage": column(x.adv),
            "state_value": column(x.old_v),
            "value_target": column(x.target),
        }
        critic = network(lambda v: v, ["v"], ["state_value"])
        make = getattr(objectives, kind)
        module = make(categorical_policy(), critic, loss_critic_type="l2", **settings)
        out = module(tensordict.TensorDict(given, [BATCH]))
        has = {*out.keys()}
        found = [out[k] if k in has else getattr(module, k) for k in names]
        return tuple(y.squeeze() for y in found)

    return theirs


def new_and_old(x):
    return rl.token_log_probs(x.logits, x.a), rl.token_log_probs(x.old_logits, x.a)


@case(
    on_policy,
    of_policy(
        "ClipPPOLoss",
        *("loss_objective", "loss_critic", "loss_entropy"),
        clip_epsilon=(0.2, BOUND),
        clip_value=0.2,
        entropy_coeff=0.01,
        critic_coeff=0.5,
    ),
    "logits v",
)
def ppo(x):
    loss = rl.ppo_clip_loss(*new_and_old(x), x.adv, epsilon=0.2, epsilon_high=BOUND)
    bonus = rl.entropy_bonus_loss(rl.softmax().entropy(x.logits))
    of_value = rl.clipped_value_loss(x.v, x.old_v, x.target, epsilon=0.2)
    return loss, of_value, 0.01 * bonus


@case(
    on_policy,
    of_policy(
        "ClipPPOLoss",
        *("clip_fraction", "kl_approx", "explained_variance"),
        clip_epsilon=(0.2, BOUND),
    ),
)
def ppo_diagnostics(x):
    clipped = rl.clip_fraction(*new_and_old(x), epsilon=0.2, epsilon_high=BOUND)
    kl = rl.approximate_kl(*new_and_old(x), estimator="k1")
    return clipped, kl, rl.explained_variance(x.v, x.target)


@case(on_policy, of_policy("ClipPPOLoss", "ESS"), differs="it is a share of samples")
def effective_sample_size(x, as_torchrl=False):
    size = rl.effective_sample_size(jnp.subtract(*new_and_old(x)))
    return size / BATCH if as_torchrl else size


@case(
    on_policy,
    of_policy("ClipPPOLoss", "loss_objective", normalize_advantage=True),
    "logits",
)
def standardized_ppo(x):
    adv = rl.standardize_advantages(x.adv, ddof=1)
    return rl.ppo_clip_loss(*new_and_old(x), adv)


@case(
    on_policy,
    of_policy("KLPENPPOLoss", "loss_objective", "beta", beta=0.7, dtarg=0.6),
)
def ppo_with_a_kl_penalty(x):
    kl_t = rl.categorical_kl_divergence(x.old_logits, x.logits)
    beta = jnp.float32(0.7)
    loss = rl.ppo_kl_penalty_loss(*new_and_old(x), x.adv, kl_t, kl_coefficient=beta)
    return loss, rl.adaptive_kl_coefficient(beta, kl_t.mean(), target_kl=0.6)


@case(on_policy, of_policy("A2CLoss", "loss_objective", "loss_critic"), "logits v")
def a2c(x):
    loss = rl.log_prob_policy_gradient_loss(new_and_old(x)[0], x.adv)
    return loss, 2 * rl.l2_loss(x.v, x.target).mean()


# Language models


class Policy(nn.TensorDictModuleBase):
    """What losses of tokens ask of a policy."""

    in_keys: ClassVar = ["logits"]
    out_keys: ClassVar = ["log_probs"]

    def get_dist(self, given, **_):
        mask = given["masks", "all_attention_mask"]
        return modules.LLMMaskedCategorical(logits=given["logits"], mask=mask)


def tokens(x):
    likelihoods = {"log_mu": -np.abs(x.f(4, 5)), "log_ref": -np.abs(x.f(4, 5))}
    mask_t = np.arange(5) < 1 + x.i(5, 4, 1)
    rest = {"a": x.i(ACTIONS, 4, 5), "adv": x.f(4), "mask_t": mask_t}
    return likelihoods | rest | {"logits": x.f(4, 5, ACTIONS)}


def of_tokens(kind, *names, **settings):
    def theirs(x):
        shared = {"entropy_bonus": False, "masking_strategy": "generic"}
        module = getattr(llm, kind)(Policy(), **shared, **settings)
        keys = {"sample_log_prob": "log_mu", "ref_log_probs": "log_ref"}
        module.set_keys(action="a", advantage="adv", **keys)
        given = {
            name: getattr(x, name) for name in ("logits", "a", "log_mu", "log_ref")
        }
        given["adv"] = x.adv[:, None, None].expand(*x.a.shape, 1)
        given["masks"] = {"all_attention_mask": x.mask_t}
        out = module(tensordict.TensorDict(given, [len(x.a)]))
        return tuple(getattr(out, name).squeeze() for name in names)

    return theirs


def ratios(x):
    return rl.token_log_probs(x.logits, x.a), x.log_mu


@case(
    tokens,
    of_tokens("GRPOLoss", "loss_objective", aggregation="prompt_mean"),
    "logits",
)
def grpo(x):
    settings = {"epsilon": 0.2, "mask_t": x.mask_t, "reduction": "none"}
    loss_t = rl.grpo_loss(*ratios(x), x.adv, **settings)
    return rl.aggregate_tokens(loss_t, "sequence_mean", mask_t=x.mask_t)


@case(tokens, of_tokens("DAPO", "loss_objective", clip_epsilon=(0.2, BOUND)), "logits")
def dapo(x):
    settings = {"epsilon": 0.2, "epsilon_high": BOUND, "mask_t": x.mask_t}
    return rl.grpo_loss(*ratios(x), x.adv, **settings)


@case(
    tokens,
    of_tokens("CISPOLoss", "loss_objective", clip_epsilon=(0.999, BOUND)),
    "logits",
    differs="it has no log-probability, and no gradient where the ratio is clipped",
)
def cispo(x, as_torchrl=False):
    if as_torchrl:
        settings = {"max_weight": 1 + BOUND, "use_stop_gradient": False}
        log_ratios = jnp.subtract(*ratios(x))
        weight = rl.truncated_importance_weights(log_ratios, **settings)
        return -jnp.mean(weight * x.adv[:, None], where=x.mask_t)
    return rl.cispo_loss(*ratios(x), x.adv, ratio_max=1 + BOUND, mask_t=x.mask_t)


@case(
    tokens,
    of_tokens("GRPOLoss", "kl_to_ref", "kl_approx", kl_to_ref_coeff=0.1),
    differs="its mean is over padding as well",
)
def kl_of_tokens(x, as_torchrl=False):
    new, old = ratios(x)
    settings = {"mask_t": x.mask_t, "reduction": "mean"}
    to_reference = rl.kl_estimate_k3(new, x.log_ref, **settings)
    kl = rl.approximate_kl(new, old, estimator="k1", mask_t=x.mask_t)
    share = x.mask_t.mean() if as_torchrl else 1
    return to_reference * share, kl * share


def shapes(**shapes):
    """Random arrays of these shapes."""
    return lambda x: {name: x.f(*shape) for name, shape in shapes.items()}


@case(shapes(p=(9,), q=(9,)), lambda x: llm.k3_kl_token_estimate(x.p, x.q), "q")
def k3(x):
    settings = {"reduction": "none", "use_stop_gradient": True}
    return rl.kl_estimate_k3(x.q, x.p, **settings)


def group_in_torchrl(x):
    done = torch.ones(1, 1, dtype=bool)
    answers = [
        tensordict.TensorDict(
            {"query": "?", "next": {"reward": r.reshape(1, 1), "done": done}}, [1]
        )
        for r in x.rewards
    ]
    group = llm.MCAdvantage(grpo_size=4).inv(tensordict.lazy_stack(answers))
    return group["advantage"].flatten()


@case(shapes(rewards=(4,)), group_in_torchrl)
def group_advantages(x):
    return rl.group_relative_advantages(x.rewards, ddof=1)


def controlled_in_torchrl(x):
    control = data.AdaptiveKLController(init_kl_coef=0.2, target=1.0, horizon=10)
    control.update([x.kl.abs().item()])
    return control.coef


@case(
    shapes(kl=()),
    controlled_in_torchrl,
    differs="it takes off as much whatever the divergence is",
)
def proportional_kl_coefficient(x, as_torchrl=False):
    kl = 0.0 if as_torchrl else jnp.abs(x.kl)
    settings = {"target_kl": 1.0, "gain": 0.1}
    return rl.proportional_kl_coefficient(jnp.float32(0.2), kl, **settings)


# Transforms and distributions


def binned(x):
    return {"x": 20 * x.f(9), "logits": x.f(9, ATOMS), "bins": np.sort(9 * x.f(ATOMS))}


def two_hot_in_torchrl(x):
    loss = objectives.two_hot_cross_entropy(x.logits, x.x, x.bins)
    decoded = objectives.two_hot_decode(x.logits, x.bins)
    return objectives.two_hot_encode(x.x, x.bins), loss, decoded


@case(binned, two_hot_in_torchrl, "logits")
def two_hot(x):
    loss = rl.two_hot_loss(x.logits, x.x, x.bins, reduction="none")
    decoded = rl.transform_from_2hot_nonlinear(jax.nn.softmax(x.logits), x.bins)
    return rl.transform_to_2hot_nonlinear(x.x, x.bins), loss, decoded


NAMES = "symlog", "symexp", "signed_hyperbolic", "signed_parabolic"


@case(
    shapes(x=(9,)),
    lambda x: tuple(getattr(modules, name)(3 * x.x) for name in NAMES),
    "x",
)
def transforms_of_values(x):
    transforms = rl.signed_logp1, rl.signed_expm1, rl.signed_hyperbolic
    return tuple(tx(3 * x.x) for tx in (*transforms, rl.signed_parabolic))


def masked(x):
    mask = x.b(0.6, BATCH, ACTIONS) | (np.arange(ACTIONS) == 1)
    return {"logits": x.f(BATCH, ACTIONS), "a": np.full(BATCH, 1), "mask": mask}


def masked_in_torchrl(x):
    policy = modules.MaskedCategorical(logits=x.logits, mask=x.mask)
    return policy.log_prob(x.a), policy.probs, entropy_in_torchrl(x).detach()


def entropy_in_torchrl(x):
    return modules.MaskedCategorical(logits=x.logits, mask=x.mask).entropy()


@case(masked, masked_in_torchrl, "logits")
def masked_softmax(x):
    policy, mask = rl.softmax(), {"mask": x.mask}
    entropy = jax.lax.stop_gradient(policy.entropy(x.logits, **mask))
    return (
        policy.logprob(x.a, x.logits, **mask),
        policy.probs(x.logits, **mask),
        entropy,
    )


def tanh_normal_in_torchrl(x):
    policy = modules.TanhNormal(x.mu, x.log_sigma.exp(), low=-1.0, high=2.0)
    return policy.log_prob(1.5 * x.pre_tanh.tanh() + 0.5)


@case(
    shapes(mu=(4, 3), log_sigma=(4, 3), pre_tanh=(4, 3)),
    tanh_normal_in_torchrl,
    "mu log_sigma",
)
def tanh_gaussian(x):
    given = x.pre_tanh, x.mu, jnp.exp(x.log_sigma)
    return rl.tanh_gaussian_log_prob(*given, minimum=-1.0, maximum=2.0)


def normal_in_torchrl(x):
    policy = modules.IndependentNormal(x.mu, x.log_sigma.exp())
    return policy.log_prob(x.a), policy.entropy()


@case(shapes(mu=(4, 3), log_sigma=(4, 3), a=(4, 3)), normal_in_torchrl, "mu log_sigma")
def gaussian(x):
    policy, sigma = rl.gaussian_diagonal(), jnp.exp(x.log_sigma)
    return policy.logprob(x.a, x.mu, sigma), policy.entropy(x.mu, sigma)


@case(
    shapes(p=(4, 2, 3), q=(4, 2, 3)),
    lambda x: objectives.categorical_kl_terms(x.p, x.q, free_nats=0.0, unimix=0.0),
    "p q",
)
def kl_of_world_models(x):
    kl = lambda p, q: rl.categorical_kl_divergence(p, q).sum(-1).mean()
    fixed = jax.lax.stop_gradient
    return kl(fixed(x.p), x.q), kl(x.p, fixed(x.q))


def test_the_entropy_of_legal_actions_has_a_gradient():
    """In TorchRL some of it is NaN; where it is not, it agrees."""
    given = masked(Draws(0))
    entropy = lambda x: rl.softmax().entropy(x.logits, mask=x.mask)
    ours = in_jax(entropy, ["logits"], given)[1]
    theirs = in_torch(entropy_in_torchrl, ["logits"], given)[1]
    nan = np.isnan(theirs)
    assert nan.any()
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours[~nan], theirs[~nan], rtol=1e-4, atol=1e-6)


def test_legal_actions_of_an_epsilon_greedy_policy():
    draws, mask = 20_000, np.array([True, False, True, True])
    greedy = torch.nn.functional.one_hot(torch.full((draws,), 2), 4)
    settings = {"eps_init": 0.4, "eps_end": 0.4, "action_mask_key": "mask"}
    explore = modules.EGreedyModule(data.OneHot(4), **settings)
    given = {"action": greedy, "mask": torch.tensor(mask).expand(draws, 4)}
    drawn = explore(tensordict.TensorDict(given, [draws]))["action"]
    preferences = jnp.float32([0, 9, 2, 1])
    probs = rl.epsilon_greedy(0.4).probs(preferences, mask=mask)
    np.testing.assert_allclose(probs, drawn.double().mean(0), atol=0.015)


# Statistics and curiosity

SEEN = shapes(first=(20,), second=(20,))


def normalized(kind, *names, **settings):
    """The state of a normalizer that has seen two batches, and the second by it."""

    def theirs(x):
        norm = getattr(modules, kind)(**settings)
        norm.update(column(x.first))
        norm.update(column(x.second))
        state = (getattr(norm, name).squeeze() for name in names)
        return *state, norm.normalize(column(x.second)).squeeze()

    return theirs


def after_both(update, state, x):
    return update(update(state, x.first), x.second)


@case(SEEN, normalized("RunningValueNorm", "mean", "m2"))
def running_statistics(x):
    start = rl.RunningStatistics(jnp.float32(0), jnp.float32(1))
    state = after_both(rl.update_running_statistics, start, x)
    norm = rl.normalize_by_running_statistics(state, x.second)
    return state.mean, state.variance * state.count, norm


def prior_in_torchrl(x):
    norm = transforms.RunningMeanStd((), epsilon=2.0)
    norm.update(x.first)
    norm.update(x.second)
    return norm.mean, norm.var


@case(SEEN, prior_in_torchrl)
def running_statistics_with_a_prior(x):
    start = rl.RunningStatistics(*jnp.float32([0, 1, 2]))
    state = after_both(rl.update_running_statistics, start, x)
    return state.mean, state.variance


@case(
    SEEN,
    normalized("PopArtValueNorm", beta=0.9),
    differs="it corrects for what it starts with",
)
def popart(x, as_torchrl=False):
    where = jnp.zeros(len(x.first), int)
    update = lambda state, seen: rl.art(state, seen, where, 0.1, 1e-6, 1e6)
    state = after_both(update, rl.PopArtState(*jnp.float32([[0], [1], [1]])), x)
    if as_torchrl:
        shift = state.shift / (1 - 0.81)
        square = (state.second_moment - 0.81) / (1 - 0.81)
        state = rl.PopArtState(shift, jnp.sqrt(square - shift**2), square)
    return rl.normalize(state, x.second, where)


def range_in_torchrl(x):
    low, high, _ = normalized("PercentileValueNorm", "low", "high")(x)
    return high - low


@case(SEEN, range_in_torchrl, differs="its average starts at zero")
def return_range(x, as_torchrl=False):
    start = rl.ReturnRange(*jnp.float32([0, 0]))
    state = after_both(rl.update_return_range, start, x)
    return state.range * state.weight if as_torchrl else state.range


def rnd_in_torchrl(x):
    networks = torch.nn.Identity(), Scaled(torch.zeros(()))
    module = objectives.RNDLoss(*networks, update_fraction=1.0)
    given = tensordict.TensorDict({"next": {"observation": x.error}}, [BATCH])
    return module(given)["loss_predictor"]


@case(shapes(error=(BATCH, 4)), rnd_in_torchrl, "error", differs=COMPONENTS)
def rnd(x, as_torchrl=False):
    loss = rl.rnd_loss(x.error, jnp.zeros_like(x.error))
    return loss / 4 if as_torchrl else loss


# Replay and planning


def per_in_torchrl(x):
    sampler = data.PrioritizedSampler(8, alpha=0.7, beta=0.5, eps=1e-3)
    storage = data.LazyTensorStorage(8)
    replay = data.ReplayBuffer(storage=storage, sampler=sampler, batch_size=500)
    replay.extend(torch.arange(8.0))
    replay.update_priority(torch.arange(8), 0.5 + x.errors.abs())
    _, info = replay.sample(return_info=True)
    return torch.zeros(8).index_put((info["index"],), info["priority_weight"])


@case(shapes(errors=(8,)), per_in_torchrl)
def prioritized_replay(x):
    priorities = rl.proportional_priorities(0.5 + jnp.abs(x.errors), epsilon=1e-3)
    probs = rl.prioritized_probabilities(priorities, priority_exponent=0.7)
    return rl.prioritized_importance_weights(probs, importance_exponent=0.5)


def n_steps_in_torchrl(x):
    flags = {name: y[None] for name, y in steps(x).items() if "value" not in name}
    flags["truncated"] = flags["done"] & ~flags["terminated"]
    time = torch.arange(STEPS + 1.0)[None, :, None]
    given = {
        "observation": time[:, :-1],
        "collector": {"mask": torch.ones(1, STEPS, dtype=bool)},
        "next": flags | {"observation": time[:, 1:]},
    }
    fold = data.MultiStep(gamma=GAMMA, n_steps=3)
    out = fold(tensordict.TensorDict(given, [1, STEPS]))[0]
    later, discount_t = out["next"], out["gamma"].reshape(STEPS)
    discount_t = discount_t * ~later["terminated"][:, 0]
    return later["reward"][:, 0], discount_t, later["observation"][:, 0] - 1


@case(
    trajectory,
    n_steps_in_torchrl,
    differs="it has a discount where an episode ends after the first step",
)
def n_step_transitions(x, as_torchrl=False):
    end = (x.truncated | as_torchrl & x.terminated).at[-1].set(True)
    discount_t = jnp.full_like(x.r_t, GAMMA) if as_torchrl else x.discount_t
    out = rl.n_step_transitions(x.r_t, discount_t, 3, truncation_t=end)
    first = as_torchrl & x.terminated
    return out._replace(discount_t=jnp.where(first, 0, out.discount_t))


def search(x):
    visits = np.append(1 + x.i(4, 4), 0)
    prior = np.float32(x.rng.dirichlet(np.ones(5)))
    return {"prior": prior, "q": x.f(5), "visits": visits}


def puct_in_torchrl(x):
    given = {"visits": x.visits, "total_visits": x.visits.sum(), "prior_prob": x.prior}
    given["win_count"] = x.q * x.visits
    return modules.PUCTScore(c=1.5)(tensordict.TensorDict(given, []))["score"]


@case(search, puct_in_torchrl, differs="it divides by zero visits")
def puct(x, as_torchrl=False):
    q = jnp.where(x.visits > 0, x.q, jnp.nan if as_torchrl else 0)
    scores = rl.puct_scores(x.prior, q, x.visits, c1=1.5, c2=jnp.inf)
    return jnp.where(x.visits > 0, scores, q) if as_torchrl else scores


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_torchrl(name):
    case = CASES[name]
    equal = [*compared(case, **{"as_torchrl": True} if case.differs else {})]
    assert np.all(equal), equal


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].differs])
def test_what_differs_does(name):
    assert not np.all([*compared(CASES[name])]), CASES[name].differs
