import dataclasses
import functools
import math
import sys

import console
import dnc_copy
import jax
import jax.numpy as jnp
import loop
import numpy as np
import optax
import pytest
import run_folder
from dnc_copy import Batch, Config, Learning, RepeatCopy, State

TINY = {"num_bits": 2, "max_length": 2, "max_repeats": 1, "hidden": 8, "batch_size": 4}
TINY |= {"memory_size": 4, "word_size": 4}

GRU = TINY | {"core": "gru", "batch_size": 16, "hidden": 16}
GRU |= {"learning_rate": 1e-2, "steps": 300, "evaluate_every": 200}

adam = pytest.mark.usefixtures("ordinary_promotion")  # on which it relies


# --- The task -------------------------------------------------------------------------


@functools.cache
def drawn(**flags):
    """Returns the configuration and a batch of 300 sequences, time last but one."""
    config = Config(**flags)
    batch = jax.jit(RepeatCopy(config).batch, static_argnums=1)(jax.random.key(1), 300)
    return config, Batch(*[np.moveaxis(np.asarray(x), 0, 1) for x in batch])


def read(config, inputs):
    """Reads the sequence and the number of repeats off the inputs."""
    (go,) = np.flatnonzero(inputs[:, -1])
    return inputs[:go, :-1], round(float(inputs[go, -1]) * config.max_repeats)


SHAPES = [
    {"num_bits": 3, "min_length": 2, "max_length": 4, "max_repeats": 3},
    {"num_bits": 1, "min_length": 1, "max_length": 1, "max_repeats": 1},
    {"num_bits": 2, "min_length": 3, "max_length": 3, "max_repeats": 2},
]


@pytest.mark.parametrize("flags", SHAPES)
def test_a_sequence_is_shown_then_repeated_as_often_as_the_go_flag_says_then_ended(
    flags,
):
    config, batch = drawn(**flags)
    bits, length = config.num_bits, config.max_length * (config.max_repeats + 1) + 2
    assert batch.inputs.shape == batch.targets.shape == (300, length, bits + 1)
    for inputs, targets, mask in zip(*batch, strict=True):
        sequence, repeats = read(config, inputs)
        answer = np.vstack([np.tile(sequence, (repeats, 1)), np.zeros((1, bits))])
        end = np.eye(len(answer))[-1]
        before = len(sequence) + 1
        after = length - before - len(answer)
        expected = np.column_stack([answer, end])
        np.testing.assert_array_equal(
            targets, np.pad(expected, ((before, after), (0, 0)))
        )
        np.testing.assert_array_equal(
            mask, np.repeat([False, True, False], [before, len(answer), after])
        )
        assert not inputs[before:].any()


@pytest.mark.parametrize("flags", SHAPES)
def test_every_length_and_number_of_repeats_is_drawn_equally_often(flags):
    config, batch = drawn(**flags)
    pairs = [(len(s), r) for s, r in (read(config, inputs) for inputs in batch.inputs)]
    lengths = range(config.min_length, config.max_length + 1)
    cases = [(n, r) for n in lengths for r in range(1, config.max_repeats + 1)]
    assert set(pairs) == set(cases)
    for case in cases:  # four standard deviations
        share = 1 / len(cases)
        spread = 4 * math.sqrt(share * (1 - share) / 300)
        assert pairs.count(case) / 300 == pytest.approx(share, abs=spread)


def test_every_bit_is_the_toss_of_a_coin():
    config, batch = drawn(**SHAPES[0])
    shown = np.vstack([read(config, inputs)[0] for inputs in batch.inputs])
    assert set(shown.ravel()) == {0.0, 1.0}
    spread = 4 * math.sqrt(0.25 / len(shown))
    np.testing.assert_allclose(shown.mean(axis=0), 0.5, atol=spread)
    together = np.mean(shown[:, 0] * shown[:, 1])
    assert together == pytest.approx(0.25, abs=spread)


# --- Learning -------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_per_sequence_in_bits_of_what_counts(rng):
    rules = RepeatCopy(Config(**TINY))
    batch = Batch(
        inputs=np.zeros((6, 5, 3), np.float32),
        targets=rng.integers(2, size=(6, 5, 3)).astype(np.float32),
        mask=rng.random((6, 5)) < 0.5,
    )
    logits = rng.normal(size=(6, 5, 3)).astype(np.float32)
    rules.logits = lambda params, inputs: logits
    chances = 1 / (1 + np.exp(-logits))
    told = np.where(batch.targets == 1, chances, 1 - chances)
    expected = -np.log2(told[batch.mask]).sum() / 5
    assert jax.jit(rules.loss)(None, batch) == pytest.approx(expected, rel=1e-5)


def test_wrong_bits_are_counted_where_they_count():
    rules = RepeatCopy(Config(**TINY, evaluation_episodes=3))
    targets = np.zeros((8, 3, 3), np.float32)
    targets[:4, :, 0] = 1
    mask = np.zeros((8, 3), bool)
    mask[:4] = True
    logits = np.where(targets, 5.0, -5.0).astype(np.float32)
    logits[0, 1] *= -1  # all three bits
    logits[3, 2, 0] *= -1
    logits[5, 0] *= -1  # does not count
    rules.batch = lambda key, size: Batch(np.zeros_like(targets), targets, mask)
    rules.logits = lambda params, inputs: logits
    metrics = jax.jit(rules.evaluate)(None)
    assert metrics["wrong"] == pytest.approx(4 / 3)
    assert metrics["right"] == pytest.approx(1 / 3)


def losses_of(learning, count):
    return np.array([float(next(learning).metrics["loss"]) for _ in range(count)])


@pytest.fixture(scope="module")
def gru():
    """Small rules, compiled, and the state they start from."""
    learning = Learning(RepeatCopy(Config(**GRU)))
    return learning, jax.tree.map(np.array, learning.state)


@adam
def test_a_small_core_halves_its_loss_on_short_sequences(gru):
    learning, start = gru
    learning.state = jax.tree.map(jnp.asarray, start)
    losses = losses_of(learning, 300)
    assert losses[-20:].mean() < losses[0] / 2


@adam
def test_one_seed_gives_one_curve(gru):
    learning, start = gru
    learning.state = jax.tree.map(jnp.asarray, start)
    again = Learning(RepeatCopy(Config(**GRU)))
    np.testing.assert_array_equal(losses_of(again, 5), losses_of(learning, 5))


def test_another_seed_draws_everything_anew():
    keys = []
    for seed in (0, 1):
        rules = RepeatCopy(Config(**GRU, seed=seed))
        keys += [rules.key_init, rules.key_train, rules.key_test]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 6


@adam
def test_learning_goes_on_from_a_copy_of_its_state_as_it_would_have(gru):
    learning, start = gru
    learning.state = jax.tree.map(jnp.asarray, start)
    losses_of(learning, 3)
    saved = jax.tree.map(np.array, learning.state)
    expected = losses_of(learning, 3)
    learning.state = jax.tree.map(jnp.asarray, saved)
    np.testing.assert_array_equal(losses_of(learning, 3), expected)


@adam
def test_the_engine_counts_batches(gru):
    learning, start = gru
    learning.state = jax.tree.map(jnp.asarray, start)
    seen = []
    note = lambda engine: seen.append((engine.steps, int(learning.state.steps)))
    loop.Engine(learning, hooks=[loop.Every(2, note)]).run(5)
    assert seen == [(0, 0), (2, 2), (4, 4), (5, 5)]


def test_batches_of_training_and_evaluation_all_differ():
    rules = RepeatCopy(Config(**GRU))
    rules.logits = lambda params, inputs: inputs + params
    rules.optimizer = optax.identity()
    drawn, nothing = [], Batch(*jnp.zeros((2, 6, 1, 3)), jnp.zeros((6, 1), bool))

    def spy(key, size):
        jax.debug.callback(drawn.append, jax.random.key_data(key))
        return nothing

    rules.batch = spy
    params, learn = jnp.zeros((1, 1, 3)), jax.jit(rules.learn)
    state = State(params, rules.optimizer.init(params), jnp.int32(0))
    for _ in range(3):
        state, _ = learn(state)
    jax.jit(rules.evaluate)(params)
    jax.effects_barrier()
    assert len({tuple(key.tolist()) for key in drawn}) == len(drawn) == 4


@adam
@pytest.mark.slow
def test_a_dnc_learns_to_copy_and_repeat_short_sequences_without_a_mistake():
    flags = {"num_bits": 2, "max_length": 2, "max_repeats": 2, "steps": 1500}
    rules = RepeatCopy(Config(**flags))
    learning = Learning(rules)
    assert losses_of(learning, 1500)[-100:].mean() < 0.1
    assert jax.jit(rules.evaluate)(learning.state.params)["right"] == 1.0


# --- The script -----------------------------------------------------------------------


def test_the_example_shows_what_was_to_be_said_and_what_was():
    rules = RepeatCopy(Config(**TINY, min_length=2))
    rules.say = lambda params, inputs: jnp.ones_like(inputs)
    lines = dnc_copy.example(rules, None).splitlines()
    inputs, targets, outputs = lines[1:4], lines[5:8], lines[9:12]
    assert inputs[2].rstrip() == "  ..#"
    assert {line[2:4] for line in inputs[:2]} <= {"..", ".#", "#.", "##"}
    assert [line[5:7] for line in targets[:2]] == [line[2:4] for line in inputs[:2]]
    assert targets[2] == "     ..#"
    assert outputs == ["     ###"] * 3


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["dnc_copy.py", *map(str, flags)])
    return console.run(Config, dnc_copy.RepeatCopyExperiment)


@adam
def test_a_run_logs_what_it_learns_and_ends_with_an_example(
    gru, monkeypatch, capsys, tmp_path
):
    learning, start = gru
    learning.state = jax.tree.map(jnp.asarray, start)

    def rules_of(config):
        assert dataclasses.replace(config, out=None) == learning.rules.config
        return learning.rules

    monkeypatch.setattr(dnc_copy, "RepeatCopy", rules_of)
    monkeypatch.setattr(dnc_copy, "Learning", lambda rules: learning)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in GRU.items()]
    assert call(monkeypatch, *flags, f"--out={tmp_path}") == 0
    assert learning.state.steps == 300
    _, columns = run_folder.read(tmp_path)
    assert columns["steps"].tolist() == [0, 200, 300]
    bits = columns["evaluation_bits"].tolist()
    assert bits == sorted(bits, reverse=True)
    printed = capsys.readouterr().out.splitlines()
    titles = [line for line in printed if line in {"inputs:", "targets:", "outputs:"}]
    assert len(titles) == 3


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (
            ["--min-length=3", "--max-length=2"],
            "min_length must be at most max_length = 2, got 3",
        ),
        (["--num-bits=0"], "num_bits must lie in [1, 2^31), got 0"),
        (["--env=Catch"], "--env=Catch"),
        (["--environments=2"], "--environments=2"),
        (["--core=rnn"], "rnn"),
    ],
)
def test_a_mistake_in_the_flags_is_told_in_one_line_with_status_2(
    flags, problem, monkeypatch, capsys
):
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, *flags)
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert problem in told
    assert told.count("\n") == 1
