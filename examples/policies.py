"""Policies over whatever actions an environment takes, and a network to steer them.

`policy_for` looks at the environment's actions: one of several gives a `Categorical`,
an array within bounds a `Gaussian`. Both turn what a network puts out for an
observation, `f[K]`, into actions, their log-probabilities and the entropy. Their
methods take any leading axes.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from actions import Bounds, number_of
from dm_env import specs
from jax import Array
from networks import Network

import rlprims


class Categorical:
    """Draws one of several actions; a network puts out their logits, `f[A]`."""

    def __init__(self, actions: specs.DiscreteArray) -> None:
        distribution = rlprims.softmax()
        self.num_outputs, self.num_deviations = number_of(actions), 0
        self.sample, self.log_prob = distribution.sample, distribution.logprob
        self.entropy, self.kl = distribution.entropy, distribution.kl

    def blank(self, batch: int) -> Array:
        """Returns actions to fill up with, `i[B]`."""
        return jnp.zeros(batch, jnp.int32)

    def best(self, outputs: Array) -> Array:
        """Returns the likeliest action."""
        return jnp.argmax(outputs, axis=-1)

    def for_environment(self, actions: Array) -> Array:
        """Returns what to send to the environment: the same."""
        return actions


class Gaussian:
    """Draws arrays of `N` numbers, each from a normal distribution of its own.

    A network puts out their means and the logarithms of their deviations, `f[2N]`. All
    that is learnt is about numbers on a scale where the bounds are -1 and 1, and which
    may lie beyond them; the environment gets them clipped, on its own scale.
    """

    def __init__(self, actions: specs.BoundedArray) -> None:
        self.bounds = Bounds(actions)
        self.num_outputs = self.num_deviations = self.bounds.size
        self.normal = rlprims.gaussian_diagonal()

    def blank(self, batch: int) -> Array:
        """Returns actions to fill up with, `f[B,N]`."""
        return jnp.zeros((batch, self.num_outputs))

    def sample(self, key: Array, outputs: Array) -> Array:
        """Draws actions, `f[...,N]`."""
        return self.normal.sample(key, *self.parameters(outputs))

    def log_prob(self, actions: Array, outputs: Array) -> Array:
        """Returns the log-densities of actions, before the clip."""
        return self.normal.logprob(actions, *self.parameters(outputs))

    def entropy(self, outputs: Array) -> Array:
        """Returns the entropy, before the clip."""
        return self.normal.entropy(*self.parameters(outputs))

    def best(self, outputs: Array) -> Array:
        """Returns the means."""
        return self.parameters(outputs)[0]

    def for_environment(self, actions: Array) -> Array:
        """Returns what to send to the environment, within its bounds."""
        return self.bounds.rescale(jnp.clip(actions, -1, 1))

    def parameters(self, outputs: Array) -> tuple[Array, Array]:
        """Returns means and deviations, `f[...,N]` each."""
        mu, log_sigma = jnp.split(outputs, 2, axis=-1)
        return mu, jnp.exp(log_sigma)


def policy_for(actions: Any) -> Categorical | Gaussian:
    """Makes the policy that suits the actions of an environment."""
    is_discrete = isinstance(actions, specs.DiscreteArray)
    return Categorical(actions) if is_discrete else Gaussian(actions)


class ActorCritic(nn.Module):
    """Maps an observation to what steers a policy, `f[K]`, and to its value, `f[]`.

    Policy and value share no parameters. Deviations do not depend on the observation.
    """

    num_outputs: int
    num_deviations: int
    hidden: int

    @nn.compact
    def __call__(self, observation: Array) -> tuple[Array, Array]:
        """Returns the outputs for the policy, and the value."""
        x = observation.astype(jnp.float32).reshape(-1)
        outputs = self.perceptron(x, self.num_outputs, scale=0.01)
        value = self.perceptron(x, 1, scale=1.0)[0]
        if self.num_deviations:
            shape = (self.num_deviations,)
            log_sigma = self.param("log_sigma", nn.initializers.zeros, shape)
            outputs = jnp.concatenate([outputs, log_sigma])
        return outputs, value

    def perceptron(self, x: Array, size: int, scale: float) -> Array:
        """Returns the output of two hidden layers and a linear one."""
        for _ in range(2):
            init = nn.initializers.orthogonal(2**0.5)
            x = nn.tanh(nn.Dense(self.hidden, kernel_init=init)(x))
        return nn.Dense(size, kernel_init=nn.initializers.orthogonal(scale))(x)


def actor_critic(policy: Categorical | Gaussian, hidden: int) -> Network:
    """Returns the network that agents have by default."""
    module = ActorCritic(policy.num_outputs, policy.num_deviations, hidden)
    return Network(module.init, module.apply)
