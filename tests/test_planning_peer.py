"""Planning agrees with mctx, where it is installed: `pip install -e ".[peer]"`.

mctx computes on trees of its own, so that each test grows one, or makes one of random
arrays, and hands the arrays at its root to this package. Where the two differ on
purpose, the test says so.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.gumbel_planning import (
    completed_action_values,
    gumbel_action_scores,
    gumbel_improved_policy,
    mixed_value,
    scaled_action_values,
)
from rlprims.planning import (
    interior_action_scores,
    puct_scores,
    sequential_halving_visits,
    visit_count_policy,
)

mctx = pytest.importorskip("mctx")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("ordinary_promotion"),
]
ROOT = mctx.Tree.ROOT_INDEX
MCTX_SETTINGS = {"c_scale": 0.1, "rescale": True}


def tree_of(logits, v, q, visits):
    """A root and its children, with discounts of one and no rewards."""
    actions = len(logits)
    nodes = actions + 1
    zeros = jnp.zeros((nodes, actions))
    at_root = lambda x: zeros.astype(jnp.asarray(x).dtype).at[ROOT].set(x)
    total = jnp.sum(visits)
    return mctx.Tree(
        node_visits=jnp.zeros(nodes, jnp.int32).at[ROOT].set(total + 1),
        raw_values=jnp.zeros(nodes).at[ROOT].set(v),
        node_values=jnp.zeros(nodes).at[ROOT].set(v),
        parents=jnp.zeros(nodes, jnp.int32),
        action_from_parent=jnp.zeros(nodes, jnp.int32),
        children_index=jnp.zeros((nodes, actions), jnp.int32),
        children_prior_logits=at_root(logits),
        children_visits=at_root(visits),
        children_rewards=zeros,
        children_discounts=jnp.ones_like(zeros),
        children_values=at_root(jnp.where(visits > 0, q, 0)),
        embeddings=None,
        root_invalid_actions=jnp.zeros(actions),
        extra_data=None,
    )


def random_root(rng, actions=5):
    logits, q = jnp.float32(rng.normal(size=(2, actions)))
    return (
        logits,
        jnp.float32(rng.normal()),
        q,
        jnp.int32(rng.integers(4, size=actions)),
    )


def roots(rng, count=12):
    return [random_root(rng) for _ in range(count)]


@pytest.mark.parametrize("rescale", [False, True])
def test_completed_values_and_their_scale(rng, rescale):
    for root in roots(rng):
        theirs = mctx.qtransform_completed_by_mix_value(
            tree_of(*root), ROOT, rescale_values=rescale
        )
        q = completed_action_values(*root)
        ours = scaled_action_values(q, root[3], c_scale=0.1, rescale=rescale)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_is_not_legal_does_not_widen_the_range():
    """In mctx it does, with the mixed value; the result is as if it were left out."""
    least = jnp.finfo(jnp.float32).min
    logits, mask = jnp.array([0.0, 1.0, least]), jnp.array([True, True, False])
    q, visits = jnp.array([0.25, 0.5, 0.0]), jnp.array([2, 3, 0])
    values = completed_action_values(logits, 9.0, q, visits, mask=mask)
    ours = scaled_action_values(values, visits, **MCTX_SETTINGS, mask=mask)[:2]
    of_mctx = mctx.qtransform_completed_by_mix_value
    left_out = of_mctx(tree_of(logits[:2], 9.0, q[:2], visits[:2]), ROOT)
    np.testing.assert_allclose(ours, left_out, rtol=1e-5)
    assert (ours - of_mctx(tree_of(logits, 9.0, q, visits), ROOT)[:2] > 1).any()


def test_the_mixed_value(rng):
    """What mctx gives an action without visits, at a scale of one."""
    for logits, v, q, seen in roots(rng):
        visits = seen.at[0].set(0)
        theirs = mctx.qtransform_completed_by_mix_value(
            tree_of(logits, v, q, visits),
            ROOT,
            value_scale=1.0,
            maxvisit_init=1.0 - visits.max(),
            rescale_values=False,
        )
        ours = mixed_value(logits, v, q, visits)
        np.testing.assert_allclose(ours, theirs[0], rtol=1e-5, atol=1e-6)


def test_the_mixed_value_of_what_the_policy_hardly_takes():
    """Weighed by its prior, however small; mctx weighs all of it alike."""
    q, visits = jnp.array([0.0, 8.0, 4.0]), jnp.array([0, 1, 2])
    rare, never = jnp.array([0, -300, -300 + np.log(3)]), jnp.array([0, *[-np.inf] * 2])
    for logits, expected in ((rare, (2 + 3 * 5) / 4), (never, 2.0)):
        tree = tree_of(jnp.float32(logits), 2.0, q, visits)
        settings = {"value_scale": 1.0, "maxvisit_init": -1.0, "rescale_values": False}
        theirs = mctx.qtransform_completed_by_mix_value(tree, ROOT, **settings)
        assert theirs[0] == (2 + 3 * 6) / 4
        ours = mixed_value(jnp.float32(logits), 2.0, q, visits)
        np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_interior_actions(rng):
    for root in roots(rng):
        theirs = mctx.gumbel_muzero_interior_action_selection(
            jax.random.key(0),
            tree_of(*root),
            ROOT,
            1,
            qtransform=mctx.qtransform_completed_by_mix_value,
        )
        probs = gumbel_improved_policy(*root, **MCTX_SETTINGS)
        assert jnp.argmax(interior_action_scores(probs, root[3])) == theirs


def test_puct_actions(rng):
    """With the visits of all actions for those of the state, which mctx takes."""
    for logits, v, q, visits in roots(rng):
        tree = tree_of(logits, v, q, visits)
        tree = tree.replace(node_visits=tree.node_visits - 1)
        theirs = mctx.muzero_action_selection(
            jax.random.key(0),
            tree,
            ROOT,
            1,
            qtransform=mctx.qtransform_by_parent_and_siblings,
        )
        values = mctx.qtransform_by_parent_and_siblings(tree, ROOT)
        scores = puct_scores(jax.nn.softmax(logits), values, visits)
        assert jnp.argmax(scores) == theirs


@pytest.mark.parametrize("temperature", [0.25, 2.0])
def test_visit_count_policies(rng, temperature):
    """The weights of mctx have no temperature, but its actions do."""
    draws, rewards = 4000, jnp.float32(rng.uniform(size=3))
    logits = jnp.broadcast_to(jnp.float32(rng.normal(size=3)), (draws, 3))
    search = mctx.muzero_policy(
        None,
        jax.random.key(0),
        root_of(logits, jnp.zeros(draws)),
        bandit(rewards),
        num_simulations=12,
        temperature=temperature,
    )
    visits = search.search_tree.summary().visit_counts.astype(jnp.int32)
    np.testing.assert_allclose(
        visit_count_policy(visits), search.action_weights, rtol=1e-6
    )
    policy = visit_count_policy(visits, temperature=temperature)
    drawn = np.bincount(search.action, minlength=3) / draws
    np.testing.assert_allclose(policy.mean(axis=0), drawn, atol=0.03)


def root_of(logits, v):
    return mctx.RootFnOutput(prior_logits=logits, value=v, embedding=jnp.zeros_like(v))


def bandit(rewards):
    """A step that ends the episode, with the reward of the action."""

    def step(_, key, action, embedding):
        shape = (*action.shape, len(rewards))
        return mctx.RecurrentFnOutput(
            reward=rewards[action],
            discount=jnp.zeros(action.shape),
            prior_logits=jnp.zeros(shape),
            value=jnp.zeros(action.shape),
        ), embedding

    return step


def searched(logits, v, rewards, invalid, **settings):
    output = mctx.gumbel_muzero_policy(
        None,
        jax.random.key(0),
        root_of(logits[None], v[None]),
        bandit(rewards),
        invalid_actions=invalid[None],
        **settings,
    )
    tree = jax.tree.map(lambda x: x[0], output.search_tree)
    return tree, output.action[0], output.action_weights[0]


@pytest.mark.parametrize(("considered", "simulations"), [(4, 20), (8, 7)])
def test_a_whole_search_of_gumbel_muzero(rng, considered, simulations):
    """Of as many considered actions as a power of two: else mctx drops one more."""
    logits, rewards = jnp.float32(rng.normal(size=(2, 10)))
    v, mask = jnp.float32(0.3), jnp.arange(10) != 3
    settings = {
        "num_simulations": simulations,
        "max_num_considered_actions": considered,
    }
    tree, action, weights = searched(logits, v, rewards, ~mask, **settings)
    perturbed = jnp.where(mask, logits + tree.extra_data.root_gumbel, -jnp.inf)

    def scores(visits, wanted=None):
        q = completed_action_values(logits, v, rewards, visits, mask=mask)
        scaled = scaled_action_values(q, visits, **MCTX_SETTINGS, mask=mask)
        return gumbel_action_scores(perturbed, scaled, visits, wanted, mask=mask)

    def step(visits, wanted):
        return visits.at[jnp.argmax(scores(visits, wanted))].add(1), None

    schedule = sequential_halving_visits(mask.sum(), **settings)
    visits, _ = jax.lax.scan(step, jnp.zeros(10, int), schedule)
    assert visits.tolist() == tree.children_visits[ROOT].tolist()
    assert jnp.argmax(scores(visits)) == action
    policy = gumbel_improved_policy(
        logits, v, rewards, visits, **MCTX_SETTINGS, mask=mask
    )
    np.testing.assert_allclose(policy, weights, rtol=1e-4, atol=1e-7)


def test_of_five_actions_three_are_kept_and_two_in_mctx(rng):
    """As in the paper on sequential halving, which rounds up."""
    logits, rewards = jnp.float32(rng.normal(size=(2, 5)))
    tree, *_ = searched(logits, rewards[0], rewards, jnp.zeros(5), num_simulations=15)
    assert sorted(tree.children_visits[ROOT].tolist()) == [1, 1, 1, 6, 6]
    ours = np.bincount(sequential_halving_visits(5, 15))
    assert ours.tolist() == [5, 3, 2, 2, 2, 1]
