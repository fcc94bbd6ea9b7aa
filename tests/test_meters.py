import inspect
import itertools
import json
import math

import jax.numpy as jnp
import meters
import numpy as np
import pytest
from loop import Event, Timestep
from meters import Metric, Return, Steps, quantiles

B = 3


def event(first=(False,), last=(False,), r_t=(0.0,), **metrics):
    timestep = Timestep(
        observation=None,
        r_t=np.array(r_t, np.float32),
        discount_t=np.ones(len(r_t), np.float32),
        first=np.array(first),
        last=np.array(last),
    )
    steps = int(np.sum(~timestep.first))
    return Event(steps, timestep, {k: jnp.float32(v) for k, v in metrics.items()})


def of_metric(*values):
    return [event(loss=value) for value in values]


def episode(*rewards):
    """One environment: a reset, and then these rewards."""
    return [event(first=[True])] + [
        event(r_t=[reward], last=[i == len(rewards)])
        for i, reward in enumerate(rewards, 1)
    ]


def random_events(rng, steps):
    """Environments whose episodes end when they will, and losses of which some lack."""
    first = np.ones(B, bool)
    for _ in range(steps):
        last = (rng.random(B) < 0.2) & ~first
        reward = np.where(first, 0.0, rng.normal(size=B))
        loss = rng.normal() if rng.random() < 0.7 else math.nan
        yield event(first, last, reward, loss=loss)
        first = last


def returns_one_by_one(events):
    """The oracle: follows one environment after another."""
    ended = []
    for b in range(B):
        total = 0.0
        for i, (_, timestep, _) in enumerate(events):
            total = 0.0 if timestep.first[b] else total + float(timestep.r_t[b])
            if timestep.last[b]:
                ended.append((i, b, total))
    return [total for _, _, total in sorted(ended)]


def show(meter, events):
    for each in events:
        meter.update(each)
    return meter


def after(meter, events):
    return show(meter, events).read()


THREE = quantiles(0.1, 0.5, 0.9)
ALL = {
    "steps": Steps,
    "metric": lambda: Metric("loss"),
    "quantiles": lambda: Metric("loss", THREE),
    "return": Return,
    "return of a window": lambda: Return(window=4),
    "quantiles of returns": lambda: Return(summary=THREE),
    "quantiles of a window": lambda: Return(4, THREE),
}


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that only moves when told to."""
    now = [100.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
    return now


def counts(row):
    return {name: row[name] for name in ("steps", "episodes")}


# --- Steps ----------------------------------------------------------------------------


def test_a_reset_is_no_step_and_an_episode_counts_when_it_ends():
    events = episode(1.0, 1.0, 1.0) + episode(1.0, 1.0)[:-1]
    assert counts(after(Steps(), events)) == {"steps": 4, "episodes": 1}


def test_every_environment_counts():
    events = [
        event(first=[True] * 3, last=[False] * 3, r_t=[0.0] * 3),
        event(first=[False] * 3, last=[True, False, True], r_t=[1.0] * 3),
        event(first=[True, False, True], last=[False, True, False], r_t=[0.0] * 3),
    ]
    assert counts(after(Steps(), events)) == {"steps": 4, "episodes": 3}


def test_steps_are_never_reset():
    steps = Steps()
    assert counts(after(steps, episode(1.0))) == {"steps": 1, "episodes": 1}
    assert counts(after(steps, episode(1.0, 1.0))) == {"steps": 3, "episodes": 2}


# --- Metrics --------------------------------------------------------------------------


def test_a_mean_leaves_nan_out():
    assert after(Metric("loss"), of_metric(1.0, math.nan, 3.0)) == {"loss": 2.0}


def test_a_mean_starts_anew_when_it_was_read():
    mean = Metric("loss")
    assert after(mean, of_metric(1.0, 2.0)) == {"loss": 1.5}
    assert after(mean, of_metric(5.0)) == {"loss": 5.0}


@pytest.mark.parametrize("values", [[], [math.nan, math.nan]])
def test_what_was_never_learned_is_nan(values):
    assert math.isnan(after(Metric("loss"), of_metric(*values))["loss"])
    middle = after(Metric("loss", quantiles(0.5)), of_metric(*values))
    assert math.isnan(middle["loss_q0.5"])


def test_an_infinite_loss_shows():
    assert after(Metric("loss"), of_metric(1.0, math.inf)) == {"loss": math.inf}


def test_a_long_interval_loses_nothing(rng):
    values = rng.normal(size=5 * meters._LONG_DONE + 7).astype(np.float32)
    kinds = (Metric("loss"), Metric("loss", quantiles(0.25)))
    for value in values:
        same = event(loss=0)._replace(metrics={"loss": value})
        for meter in kinds:
            meter.update(same)
    mean, quarter = (meter.read() for meter in kinds)
    assert mean["loss"] == pytest.approx(math.fsum(values) / len(values), rel=1e-12)
    place = 0.25 * (len(values) - 1)
    below, above = np.sort(values)[[math.floor(place), math.ceil(place)]].tolist()
    expected = below + (place % 1) * (above - below)
    assert quarter["loss_q0.25"] == pytest.approx(expected, rel=1e-12)


class Late:
    """A metric that the device has not worked out yet."""

    ready = False

    def __array__(self, dtype=None, copy=None):
        assert self.ready, "waited for the device"
        return np.array(2.5)


@pytest.mark.parametrize("meter", [Metric("loss"), Metric("loss", quantiles(0.5))])
def test_the_loop_does_not_wait_for_the_device(meter):
    metrics = [Late() for _ in range(3 * meters._LONG_DONE)]
    for i, metric in enumerate(metrics):
        if i >= meters._LONG_DONE:
            metrics[i - meters._LONG_DONE].ready = True
        meter.update(event()._replace(metrics={"loss": metric}))
    for metric in metrics:
        metric.ready = True
    assert list(meter.read().values()) == [2.5]


def test_quantiles_are_named_by_their_levels():
    values = of_metric(4.0, 1.0, 3.0, math.nan, 2.0, 5.0)
    assert after(Metric("loss", quantiles(0, 0.125, 0.5, 1)), values) == {
        "loss_q0": 1.0,
        "loss_q0.125": 1.5,
        "loss_q0.5": 3.0,
        "loss_q1": 5.0,
    }


@pytest.mark.parametrize("levels", [(), (0.5, 1.5), (-0.1,), (math.nan,)])
def test_levels_of_quantiles_are_probabilities(levels):
    with pytest.raises(ValueError, match="levels must be some numbers in"):
        quantiles(*levels)


def test_an_unknown_metric_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"agent \(epsilon, loss\), got 'los'"):
        Metric("los").update(event(loss=1.0, epsilon=0.1))


# --- Returns --------------------------------------------------------------------------


def test_a_return_is_the_sum_of_an_episode():
    events = episode(1.0, 2.0) + episode(5.0)
    assert after(Return(), events) == {"training_return": 4.0}


def test_returns_are_those_of_each_environment_alone(rng):
    events = list(random_events(rng, 200))
    expected = returns_one_by_one(events)
    assert len(expected) > 50
    actual = after(Return(), events)["training_return"]
    assert actual == pytest.approx(np.mean(expected), rel=1e-12)
    actual = after(Return(window=7, name="last_7"), events)["last_7"]
    assert actual == pytest.approx(np.mean(expected[-7:]), rel=1e-12)
    actual = after(Return(summary=quantiles(0, 1)), events)
    assert list(actual) == ["training_return_q0", "training_return_q1"]
    assert list(actual.values()) == pytest.approx([min(expected), max(expected)])


def test_an_episode_counts_where_it_ends_with_all_its_rewards():
    meter, (*before, end) = Return(), episode(1.0, 2.0, 3.0)
    assert math.isnan(after(meter, before)["training_return"])
    assert after(meter, [end]) == {"training_return": 6.0}


def test_a_window_goes_on_when_it_was_read():
    meter = Return(window=2)
    assert math.isnan(meter.read()["training_return"])
    assert after(meter, episode(1.0)) == {"training_return": 1.0}
    assert after(meter, episode(3.0)) == {"training_return": 2.0}
    assert after(meter, episode(5.0)) == {"training_return": 4.0}


def test_an_episode_that_broke_off_without_an_end_is_forgotten():
    events = episode(100.0, 100.0)[:-1] + episode(1.0)
    assert after(Return(), events) == {"training_return": 1.0}


def test_returns_do_not_lose_small_rewards():
    """In float32 the second reward of 1e-4 would be lost."""
    events = episode(4096.0, *[1e-4] * 100)
    assert after(Return(), events)["training_return"] == pytest.approx(
        4096.01, rel=1e-9
    )


def test_a_window_has_room_for_an_episode():
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        Return(window=0)


def test_the_number_of_environments_stays():
    meter = show(Return(), episode(1.0))
    with pytest.raises(ValueError, match=r"shape \(1,\), got \(3,\)"):
        meter.update(event(r_t=[1.0] * 3, first=[False] * 3, last=[False] * 3))


# --- Data -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", ALL.values(), ids=list(ALL))
def test_a_run_that_was_resumed_logs_the_same_bit_for_bit(make, rng):
    events = list(random_events(rng, 120))
    straight, resumed = make(), make()
    for i, each in enumerate(events):
        straight.update(each)
        resumed.update(each)
        if i % 17 == 3:  # in the middle of an interval, and of episodes
            text = json.dumps(resumed.save())
            resumed = show(make(), events[:5])  # loading forgets what came before
            resumed.load(json.loads(text))
        if i % 40 == 39:
            rows = resumed.read(), straight.read()
            for row in rows:
                row.pop("steps_per_second", None)
            np.testing.assert_equal(*rows)
    assert json.dumps(resumed.save()) == json.dumps(straight.save())


@pytest.mark.parametrize("make", ALL.values(), ids=list(ALL))
def test_to_save_changes_nothing(make, rng):
    events = list(random_events(rng, 30))
    saved, untouched = show(make(), events), show(make(), events)
    text = json.dumps(saved.save())
    assert json.dumps(saved.save()) == text
    show(saved, events)  # does not reach into what was saved
    np.testing.assert_equal(saved.read(), show(untouched, events).read())


@pytest.mark.parametrize("make", ALL.values())
def test_what_was_saved_does_not_change_as_the_run_goes_on(make, rng):
    events = list(random_events(rng, 60))
    meter = show(make(), events[:30])
    data = meter.save()
    text = json.dumps(data)
    show(meter, events[30:]).read()
    assert json.dumps(data) == text


def test_infinities_are_saved():
    meter = show(Return(), episode(math.inf) + episode(1.0, -math.inf)[:-1])
    again = Return()
    again.load(json.loads(json.dumps(meter.save())))
    assert again.read() == {"training_return": math.inf}


# --- The clock ------------------------------------------------------------------------


def speed(row):
    return {name: row[name] for name in ("seconds", "steps_per_second")}


def test_speed_is_of_the_interval_and_seconds_of_all(clock):
    meter = Steps()
    clock[0] += 2.0
    row = after(meter, episode(*[0.0] * 8))
    assert speed(row) == {"seconds": 2.0, "steps_per_second": 4.0}
    clock[0] += 0.5
    row = after(meter, episode(*[0.0] * 4))
    assert speed(row) == {"seconds": 2.5, "steps_per_second": 8.0}


def test_the_time_between_saving_and_loading_does_not_count(clock):
    meter = show(Steps(), episode(0.0, 0.0))
    clock[0] += 3.0
    data = json.loads(json.dumps(meter.save()))
    clock[0] += 1000.0
    meter = Steps()
    meter.load(data)
    clock[0] += 1.0
    row = after(meter, episode(*[0.0] * 5))
    assert speed(row) == {"seconds": 4.0, "steps_per_second": 5.0}


def test_a_clock_that_stands_still_is_no_division_by_zero():
    assert speed(Steps().read()) == {"seconds": 0.0, "steps_per_second": 0.0}


# --- All ------------------------------------------------------------------------------


def test_every_meter_has_the_methods_of_a_meter_and_columns_of_its_own():
    public = [m for name, m in vars(meters).items() if not name.startswith("_")]
    kinds = {
        kind
        for kind in public
        if inspect.isclass(kind) and kind.__module__ == meters.__name__
    }
    assert kinds == {Steps, Metric, Return}
    made = [Steps(), Return(), Return(summary=THREE)]
    made += [Metric("loss"), Metric("loss", THREE), Metric("steps taken")]
    columns = list(itertools.chain.from_iterable(meter.read() for meter in made))
    assert len(columns) == len(set(columns)) == 4 + 1 + 3 + 1 + 3 + 1
    for method in ("update", "read", "save", "load"):
        assert all(callable(getattr(kind, method)) for kind in kinds)
