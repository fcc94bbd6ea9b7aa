"""The recipes are run as they stand, and compared with the papers, read into NumPy.

A reading takes the parameters twice: `p` where the paper learns them, and `h` where it
holds them constant. The value is that of both the same, and the gradient that of `p`
alone, by differences.
"""

import inspect
import re
from pathlib import Path

import jax
import numpy as np
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
SECTIONS = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RECIPES = {section.split("\n")[0]: CODE.findall(section) for section in SECTIONS}


def softmax(logits):
    exps = np.exp(logits)
    return exps / exps.sum(-1, keepdims=True)


def draws(key, number, shape):
    """The normal numbers that a recipe draws, one array for each part of its key."""
    keys = jax.random.split(key, number) if number > 1 else [key]
    return [np.float64(jax.random.normal(k, shape, np.float32)) for k in keys]


def steps_of(array):
    return np.ndindex(array.shape)


def ppo(p, h, batch):
    """Schulman et al. 2017, eq. 9, with the details of Engstrom et al. 2020."""
    epsilon, lambda_, r = 0.2, 0.95, batch["r_t"]
    old, after = batch["behaviour_v_tm1"], batch["behaviour_v_t"]
    deltas = r + batch["discount_t"] * after - old
    advantages = np.zeros_like(r)
    for b, t in steps_of(r):
        weight = 1.0
        for k in range(t, r.shape[1]):
            advantages[b, t] += weight * deltas[b, k]
            weight *= lambda_ * batch["discount_t"][b, k]
            if batch["truncation_t"][b, k]:
                break
    scaled = (advantages - advantages.mean()) / advantages.std()
    gains = []
    for b, t in steps_of(r):
        probs, target = softmax(p["logits_t"][b, t]), advantages[b, t] + old[b, t]
        log_prob = np.log(probs[batch["a_t"][b, t]])
        ratio = np.exp(log_prob - batch["behaviour_log_prob_t"][b, t])
        clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
        move = min(max(p["v_t"][b, t] - old[b, t], -epsilon), epsilon)
        errors = p["v_t"][b, t] - target, old[b, t] + move - target
        gains.append(
            min(ratio * scaled[b, t], clipped * scaled[b, t])
            - 0.5 * max(error**2 for error in errors)
            - 0.01 * (probs @ np.log(probs))
        )
    return -np.mean(gains)


def critic(weights, obs, action, i):
    return np.tanh(np.concatenate([obs, action]) @ weights[:, i])


def sac(p, h, target_critics, batch, key):
    """Haarnoja et al. 2018, Algorithms and Applications, algorithm 1."""
    target_entropy, alpha = -2.0, np.exp(p["log_temperature"])
    held_alpha = np.exp(h["log_temperature"])

    def act(weights, obs, noise):
        mu, log_sigma = np.split(obs @ weights, 2)
        action = np.tanh(mu + np.exp(log_sigma) * noise)
        densities = -(noise**2) / 2 - log_sigma - np.log(2 * np.pi) / 2
        return action, np.sum(densities - np.log(1 - action**2))

    losses = []
    for *transition, noise, noise_t in zip(
        *batch, *draws(key, 2, batch[1].shape), strict=True
    ):
        obs_tm1, a_tm1, r_t, discount_t, obs_t = transition
        a_t, log_prob_t = act(h["policy"], obs_t, noise_t)
        least = min(critic(target_critics, obs_t, a_t, i) for i in range(2))
        target = r_t + discount_t * (least - held_alpha * log_prob_t)
        errors = [target - critic(p["critics"], obs_tm1, a_tm1, i) for i in range(2)]
        action, log_prob = act(p["policy"], obs_tm1, noise)
        least = min(critic(h["critics"], obs_tm1, action, i) for i in range(2))
        _, held_log_prob = act(h["policy"], obs_tm1, noise)
        losses.append(
            sum(error**2 / 2 for error in errors)
            + held_alpha * log_prob
            - least
            - alpha * (held_log_prob + target_entropy)
        )
    return np.mean(losses)


def td3(p, h, target_params, batch, key):
    """Fujimoto et al. 2018, algorithm 1."""
    losses = []
    for *transition, noise in zip(*batch, *draws(key, 1, batch[1].shape), strict=True):
        obs_tm1, a_tm1, r_t, discount_t, obs_t = transition
        a_t = np.tanh(obs_t @ target_params["policy"])
        a_t = np.clip(a_t + np.clip(0.2 * noise, -0.5, 0.5), -1, 1)
        least = min(critic(target_params["critics"], obs_t, a_t, i) for i in range(2))
        target = r_t + discount_t * least
        errors = [target - critic(p["critics"], obs_tm1, a_tm1, i) for i in range(2)]
        action = np.tanh(obs_tm1 @ p["policy"])
        value = critic(h["critics"], obs_tm1, action, 0)
        losses.append(sum(error**2 for error in errors) - value)
    return np.mean(losses)


def rainbow(p, h, target_logits_t, atoms, batch, beta):
    """The loss of C51, of the action that is best to the network that learns.

    Bellemare et al. 2017, algorithm 1; weights of Schaul et al. 2015, section 3.4.
    """
    losses, gap = [], atoms[1] - atoms[0]
    for b, a_tm1 in enumerate(batch["a_tm1"]):
        reward, discount = 0.0, 1.0
        for r, factor in zip(batch["r_t"][b], batch["discount_t"][b], strict=True):
            reward, discount = reward + discount * r, discount * factor
        best = np.argmax(softmax(h["logits_t"][b]) @ atoms)
        target = np.zeros_like(atoms)
        for prob, z in zip(softmax(target_logits_t[b, best]), atoms, strict=True):
            place = min(max(reward + discount * z, atoms[0]), atoms[-1])
            closeness = 1 - np.abs(place - atoms) / gap
            target += prob * np.maximum(closeness, 0)
        losses.append(-target @ np.log(softmax(p["logits_tm1"][b, a_tm1])))
    weights = (1 / batch["probability"]) ** beta
    return np.mean(weights / max(weights) * losses)


def iql(p, h, target_critics, batch):
    """Kostrikov et al. 2021, eqs 5 to 7, with two critics and a Gaussian policy.

    The limit on weights is that of popular code.
    """
    losses = []
    for obs_tm1, a_tm1, r_t, discount_t, obs_t in zip(*batch, strict=True):
        least = min(critic(target_critics, obs_tm1, a_tm1, i) for i in range(2))
        error = least - np.tanh(obs_tm1 @ p["values"])
        target = r_t + discount_t * np.tanh(obs_t @ h["values"])
        errors = [target - critic(p["critics"], obs_tm1, a_tm1, i) for i in range(2)]
        weight = min(np.exp(3 * (least - np.tanh(obs_tm1 @ h["values"]))), 100)
        noise = (a_tm1 - obs_tm1 @ p["policy"]) / np.exp(p["log_sigma"])
        log_prob = np.sum(-(noise**2) / 2 - p["log_sigma"] - np.log(2 * np.pi) / 2)
        losses.append(
            (0.7 if error > 0 else 0.3) * error**2
            + sum(error**2 for error in errors)
            - weight * log_prob
        )
    return np.mean(losses)


def cql(p, h, target_critics, batch, key):
    """Kumar et al. 2020, eq. 4, on a soft actor-critic.

    The sum over actions is an integral, estimated from samples.
    """
    number, alpha, threshold = 2, 0.2, 1.0
    keys, shape = jax.random.split(key, 3), (number, *batch[1].shape)
    noise, noise_t = (jax.random.normal(k, shape, np.float32) for k in keys[:2])
    uniform = jax.random.uniform(keys[2], shape, np.float32, minval=-1.0)
    noise, noise_t, uniform = map(np.float64, (noise, noise_t, uniform))

    def act(weights, obs, noise):
        action = np.tanh(obs @ weights["policy"] + np.exp(weights["log_sigma"]) * noise)
        densities = -(noise**2) / 2 - weights["log_sigma"] - np.log(2 * np.pi) / 2
        return action, np.sum(densities - np.log(1 - action**2))

    def value(critics, obs, action):
        return min(critic(critics, obs, action, i) for i in range(2))

    def excess(critics):
        """The mean of both critics, less the threshold."""
        gaps = []
        for b, i in np.ndindex(len(batch[0]), 2):
            obs_tm1, a_tm1, *_, obs_t = (x[b] for x in batch)
            samples = [(action, np.log(1 / 4)) for action in uniform[:, b]]
            samples += [act(h, obs_tm1, each) for each in noise[:, b]]
            samples += [act(h, obs_t, each) for each in noise_t[:, b]]
            weighed = [
                np.exp(critic(critics, obs_tm1, action, i)) / np.exp(log_density)
                for action, log_density in samples
            ]
            gaps.append(np.log(np.mean(weighed)) - critic(critics, obs_tm1, a_tm1, i))
        return np.mean(gaps) - threshold

    errors, gains = [], []
    for b, (obs_tm1, a_tm1, r_t, discount_t, obs_t) in enumerate(
        zip(*batch, strict=True)
    ):
        a_t, log_prob_t = act(h, obs_t, noise_t[0, b])
        following = value(target_critics, obs_t, a_t) - alpha * log_prob_t
        target = r_t + discount_t * following
        errors += [target - critic(p["critics"], obs_tm1, a_tm1, i) for i in range(2)]
        for each in noise[:, b]:
            action, log_prob = act(p, obs_tm1, each)
            gains.append(value(h["critics"], obs_tm1, action) - alpha * log_prob)
    price, held_price = np.exp(p["log_multiplier"]), np.exp(h["log_multiplier"])
    penalty = held_price * excess(p["critics"]) - price * excess(h["critics"])
    return np.mean(np.square(errors)) / 2 + penalty - np.mean(gains)


def grpo(p, h, batch):
    """Shao et al. 2024, sections 4.1.1 and 4.1.2, where the answer earns a reward."""
    gains = []
    for prompt, rewards in enumerate(batch["rewards"]):
        advantages = (rewards - rewards.mean()) / rewards.std()
        for answer, advantage in enumerate(advantages):
            total, length = 0.0, batch["mask_t"][prompt, answer].sum()
            for t in range(length):
                at = prompt, answer, t
                prob = softmax(p["logits_t"][at])[batch["tokens_t"][at]]
                ratio = prob / np.exp(batch["behaviour_log_prob_t"][at])
                reference = np.exp(batch["reference_log_prob_t"][at]) / prob
                clipped = min(max(ratio, 0.8), 1.2)
                total += min(ratio * advantage, clipped * advantage)
                total -= 0.04 * (reference - np.log(reference) - 1)
            gains.append(total / length)
    return -np.mean(gains)


def dpo(p, h, batch):
    """Rafailov et al. 2023, eq. 7."""

    def probability(logits_t, which):
        pairs = zip(logits_t[which], batch["tokens_t"][which], strict=True)
        probs = [softmax(logits)[token] for logits, token in pairs]
        return np.prod(probs[: batch["mask_t"][which].sum()])

    losses = []
    for b in range(batch["mask_t"].shape[1]):
        chosen, rejected = (
            probability(p["logits_t"], (i, b))
            / probability(batch["reference_logits_t"], (i, b))
            for i in range(2)
        )
        lead = 0.1 * np.log(chosen) - 0.1 * np.log(rejected)
        losses.append(-np.log(1 / (1 + np.exp(-lead))))
    return np.mean(losses)


READINGS = {
    "PPO": ppo,
    "SAC": sac,
    "TD3": td3,
    "Rainbow": rainbow,
    "IQL": iql,
    "CQL": cql,
    "GRPO": grpo,
    "DPO": dpo,
}


@pytest.fixture(scope="module")
def results():
    """What each recipe leaves behind when it is run as it stands."""

    def run(name):
        (code,) = RECIPES[name]
        exec(compile(code, f"<{name}>", "exec"), namespace := {})
        return namespace

    return {name: run(name) for name in RECIPES}


def wide(x):
    """In float64 where it is floating-point, and left alone where it is not."""
    keep = isinstance(x, jax.Array) or not isinstance(x, np.floating | np.ndarray)
    return x if keep or x.dtype.kind != "f" else np.float64(x)


def differences(f, params, step=1e-6):
    """The gradient of `f` by central differences."""
    slopes = {}
    for name, value in params.items():
        slopes[name] = np.zeros(np.shape(value))
        for index in np.ndindex(np.shape(value)):
            up, down = (np.array(value, np.float64) for _ in range(2))
            up[index] += step
            down[index] -= step
            rise = f(params | {name: up}) - f(params | {name: down})
            slopes[name][index] = rise / (2 * step)
    return slopes


def test_each_recipe_has_a_reading():
    assert list(RECIPES) == list(READINGS)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_short(name):
    (code,) = RECIPES[name]
    lines = code.splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 92


@pytest.mark.parametrize("name", RECIPES)
def test_losses_and_gradients_are_those_of_the_paper(name, results):
    found, reading = results[name], READINGS[name]
    params, data = jax.tree.map(wide, (found["params"], found["data"]))
    assert len(data) + 2 == len(inspect.signature(reading).parameters)
    np.testing.assert_allclose(found["loss"], reading(params, params, *data), rtol=1e-4)
    expected = differences(lambda p: reading(p, params, *data), params)
    for part, slope in expected.items():
        np.testing.assert_allclose(
            found["gradient"][part], slope, rtol=1e-3, atol=1e-5, err_msg=part
        )


@pytest.mark.parametrize("name", RECIPES)
def test_all_the_data_of_a_recipe_has_a_say(name, results, rng):
    """Else the arrays, all of terminated episodes say, would not show a mistake."""
    params, data = jax.tree.map(wide, (results[name]["params"], results[name]["data"]))
    loss = READINGS[name](params, params, *data)
    leaves, structure = jax.tree.flatten(data)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, np.ndarray) and leaf.dtype == np.float64:
            other = leaf * (1 + rng.random(leaf.shape) / 10)
            changed = structure.unflatten([*leaves[:i], other, *leaves[i + 1 :]])
            assert abs(READINGS[name](params, params, *changed) - loss) > 1e-5
