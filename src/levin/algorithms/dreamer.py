"""Dreamer (Hafner et al. 2020, arXiv:1912.01603): learning behaviours by latent imagination.

A world model of three networks replaces the env: the **state encoder** q(s|o), the **transition model** p(s'|s,a) and
the **reward model** p(r|s). The policy learns from trajectories imagined in this model, without a step of the real env.
All parts are networks and every sample is reparameterised, so the gradient of the imagined return flows through
rewards, values, transitions and actions into the policy.

Pseudocode (Algorithm 1):

    D <- random episodes
    for each iteration:
        for each env step:
            s ~ q(s | s_before, a_before, o); a ~ pi(a|s) + noise; observe r, o'; D <- D + {(o, a, r, ...)}
        for each update:
            sample B sequences of T records from D
            world model:  theta <- theta - lr grad [ KL(q || p) - log p(o|s) - log p(r|s) ]     Eq. 10, model_loss
            from each of the B T states imagine H steps: a ~ pi(a|s), s' ~ p(s'|s,a)            imagine
            V_lambda <- the lambda-return of imagined rewards and values                        Eq. 6
            actor:  phi <- phi + lr grad E[sum_t V_lambda(s_t)]                                 Eq. 7, actor_loss
            critic: psi <- psi - lr grad E[sum_t (v(s_t) - V_lambda(s_t))^2 / 2]                Eq. 8, value_loss

Deviations:
    - An iteration is 32 vector steps, then the updates due by `replay_ratio`; the paper's is one episode, then 100
      updates.
    - World model, actor and critic are updated one after the other, each by its own optimiser. Imagination therefore
      runs in the updated world model, but starts from states computed before that update.
    - There are no extra updates when learning begins; the published code makes 100 first.
    - Deterministic actions are the mode of pi at the mean of q; the published code takes the best of 100 samples.
    - Sequences begin at any record and may contain several episodes; the published code samples an episode, then a
      window of it. The action before a sequence is zero; there it is the stored one.
    - With `continue_scale`, imagination starts from all states, and terminal ones have the weight 0; the published code
      starts from all but the last of each sequence.
    - Initial weights are PyTorch's, with about a third of the variance of Keras' in the published code, which trains in
      float16.

Metrics:
    train/model_loss: total loss of the world model.
    train/kl: KL(q || p), nats, before `free_nats`.
    train/observation_loss: -log p(o|s), without its constant.
    train/reward_loss: -log p(r|s), without its constant.
    train/continue_loss: -log p(continue|s); only if there is a continue model.
    train/actor_loss: -E[weight V_lambda] with `actor_gradient=dynamics`; otherwise see `Dreamer.actor_loss`.
    train/value_loss: E[weight (v - V_lambda)^2 / 2].
    train/imagined_return: E[V_lambda].
    train/entropy: entropy of pi, nats; discrete actions only.
    eval/open_loop_5, ...: errors of open-loop predictions, see `levin.model_based.open_loop`.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import Adam, Optimizer

from levin.algorithms.base import Algorithm, Batch
from levin.algorithms.dreamer_networks import Policy, WorldModel, center_pixels
from levin.core import distributed
from levin.core.errors import ConfigError
from levin.core.spaces import IS_FIRST, EnvSpec
from levin.core.types import Activation, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from levin.data import returns
from levin.data.sequences import SequenceReplay, check_learning_starts
from levin.model_based import open_loop
from levin.model_based.recurrent import Carry, OneHotAction, RecurrentPolicy, State
from levin.nn.layers import as_float32, mlp
from levin.nn.parameters import freeze

# deter, stoch, hidden and units of `WorldModel`
SIZES = {"micro": (64, 8, 64, 64), "small": (128, 16, 128, 128), "paper": (200, 30, 200, 400)}


class Dreamer(Algorithm):
    """A world model, and an actor-critic trained on trajectories imagined in it.

    Numbers in `Args` are the paper's values.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        gamma: Discount: 0.99.
        return_lambda: Decay of the lambda-return: 0.95.
        horizon: Imagined steps, H: 15.
        batch_size: Sequences per update, B: 50.
        batch_length: Records per sequence, T: 50.
        size: Size of the networks: `paper`, `small` or `micro`.
        transition: `gru`: recurrent; `mlp`: p(s'|s,a) and q(s|o) without memory.
        actor_gradient: `dynamics`: backpropagate through the imagined trajectory; `reinforce`: score function, with v
            as baseline.
        initial_std: Std of the policy at the start of training, before tanh, for continuous actions: 5, so that nearly
            all first actions are extreme.
        entropy_coef: Weight of the policy's entropy, for discrete actions only: 0.
        free_nats: KL below which there is no KL loss, nats, averaged over the batch: 3.
        kl_scale: Weight of the KL loss: 1.
        continue_scale: Weight of the continue model's loss; 0: no continue model, imagined episodes never end.
        model_lr: Learning rate of Adam for the world model: 6e-4.
        actor_lr: Learning rate of Adam for the actor: 8e-5.
        critic_lr: Learning rate of Adam for the critic: 8e-5.
        max_grad_norm: Largest gradient norm of world model, actor and critic, each clipped separately: 100; null: no
            clipping.
        exploration_noise: Std of the noise on continuous actions in [-1, 1]: 0.3; for discrete actions, the probability
            of a uniformly random one.
        replay_ratio: Updates per env step: 0.2, from 100 updates per 1000 frames and two frames per action.
        learning_starts: Env steps before the first update: 2500, which are the source's 5000 frames.
        random_env_steps: Env steps with uniformly random actions; null: `learning_starts`.
        buffer_size: Records kept in replay.
        buffer_storage: `memory`, or `memmap` for a file.
        steps_per_iteration: Vector steps between two rounds of updates.
        activation: Activation between the layers: elu.
        compile: Compile the losses and, on a GPU, capture the whole update as a CUDA graph; compiling takes
            minutes, and results differ by rounding.
    """

    actions: ClassVar = ("box", "discrete")
    actor: Policy  # takes features of the world model
    observations: ClassVar = ("float32", "uint8")
    normalization: ClassVar = False
    buffer: SequenceReplay

    def __init__(
        self,
        *,
        env: EnvSpec,
        gamma: Fraction = 0.99,
        return_lambda: Fraction = 0.95,
        horizon: PositiveInt = 15,
        batch_size: PositiveInt = 50,
        batch_length: PositiveInt = 50,
        size: Literal["paper", "small", "micro"] = "paper",
        transition: Literal["gru", "mlp"] = "gru",
        actor_gradient: Literal["dynamics", "reinforce"] = "dynamics",
        initial_std: Annotated[float, Field(gt=0, le=100)] = 5.0,
        entropy_coef: NonNegativeFloat = 0.0,
        free_nats: NonNegativeFloat = 3.0,
        kl_scale: PositiveFloat = 1.0,
        continue_scale: NonNegativeFloat = 0.0,
        model_lr: PositiveFloat = 6e-4,
        actor_lr: PositiveFloat = 8e-5,
        critic_lr: PositiveFloat = 8e-5,
        max_grad_norm: PositiveFloat | None = 100.0,
        exploration_noise: NonNegativeFloat = 0.3,
        replay_ratio: NonNegativeFloat = 0.2,
        learning_starts: NonNegativeInt = 2500,
        random_env_steps: NonNegativeInt | None = None,
        buffer_size: PositiveInt = 1_000_000,
        buffer_storage: Literal["memory", "memmap"] = "memory",
        steps_per_iteration: PositiveInt = 32,
        activation: Activation = "elu",
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__(env, gamma)
        if buffer_size // env["num_envs"] < batch_length:
            raise ConfigError(
                f"algo.buffer_size={buffer_size} is too small for one sequence of each env: it must be at least "
                f"{batch_length * env['num_envs']}"
            )
        check_learning_starts(learning_starts, batch_length * env["num_envs"])
        if horizon < 2:
            raise ConfigError(
                "algo.horizon=1 is too short: the last imagined step only provides a value, so it must be at least 2"
            )
        if entropy_coef and env["action"]["type"] != "discrete":
            raise ConfigError(
                "algo.entropy_coef is for discrete actions: the entropy of a squashed Gaussian has no closed form; "
                "set algo.entropy_coef=0"
            )
        self.gamma, self.return_lambda, self.horizon = gamma, return_lambda, horizon
        self.batch_size, self.batch_length, self.replay_ratio = batch_size, batch_length, replay_ratio
        self.dream_steps_per_update = batch_size * batch_length * horizon
        self.learning_starts, self.steps_per_iteration = learning_starts, steps_per_iteration
        self.actor_gradient, self.entropy_coef = actor_gradient, entropy_coef
        self.free_nats, self.kl_scale, self.continue_scale = free_nats, kl_scale, continue_scale
        self.model_lr, self.actor_lr, self.critic_lr = model_lr, actor_lr, critic_lr
        self.max_grad_norm, self.exploration_noise = max_grad_norm, exploration_noise
        self.random_env_steps = learning_starts if random_env_steps is None else random_env_steps

        deter, stoch, hidden, units = SIZES[size]
        self.model = WorldModel(
            env,
            transition=transition,
            deter=deter,
            stoch=stoch,
            hidden=hidden,
            units=units,
            activation=activation,
            gamma=gamma if continue_scale > 0 else None,
        )
        self.actor = Policy(self.model.features, env, units, activation, initial_std)
        self.critic = mlp([self.model.features, units, units, units, 1], activation)
        self.carry = Carry(env["num_envs"], self.model)
        self.buffer = SequenceReplay(env, buffer_size, buffer_storage, batch_length)
        self.model_parameters, self.critic_parameters = list(self.model.parameters()), list(self.critic.parameters())
        if compile:
            self.compile_losses("model_loss", "imagination_losses")
            self.capture("update")

    def configure_optimizers(self) -> list[Optimizer]:
        self.model_optimizer = Adam(self.model_parameters, lr=self.model_lr, eps=1e-7, fused=True)
        self.actor_optimizer = Adam(self.actor.parameters(), lr=self.actor_lr, eps=1e-7, fused=True)
        self.critic_optimizer = Adam(self.critic_parameters, lr=self.critic_lr, eps=1e-7, fused=True)
        return [self.model_optimizer, self.actor_optimizer, self.critic_optimizer]

    def policy(self, *, deterministic: bool = False) -> TensorDictModule:
        carry = Carry(0, self.model).to(self.device) if deterministic else self.carry
        policy = RecurrentPolicy(
            self.model, self.actor, carry, noise=self.exploration_noise, deterministic=deterministic
        )
        return TensorDictModule(policy, in_keys=["observation", IS_FIRST], out_keys=["action"])

    def on_train_start(self) -> None:
        super().on_train_start()
        check_learning_starts(self.learning_starts, self.batch_length * self.env["num_envs"] * distributed.world_size())

    def training_step(self, rollout: TensorDictBase, _: int) -> None:
        self.buffer.extend(rollout)
        for batch in self.replay():
            self.update(batch)

    def on_evaluation(self, folder: Path) -> dict[str, float]:
        if len(self.buffer) < self.batch_length:
            return {}
        return open_loop.evaluate_open_loop(
            self.buffer, self.device, self.predict_open_loop, folder / f"{self.env_steps}.png"
        )

    def predict_open_loop(self, window: TensorDict) -> tuple[dict[str, Tensor], Tensor]:
        """Return predicted observations and rewards of windows `[B, L]`.

        The model reads the observations of the first `CONTEXT` records, and after that only the actions.
        """
        context = [window[key][:, : open_loop.CONTEXT] for key in ("observation", "action", "is_first")]
        states, _, _ = self.model.observe_sequence(*context)
        features, state = list(states.feature.unbind(1)), State(*(part[:, -1] for part in states))
        for t in range(open_loop.CONTEXT - 1, window.shape[1] - 1):
            state = self.model.imagine_step(state, window["action"][:, t])
            features.append(state.feature)
        feature = torch.stack(features, 1).flatten(0, 1)
        observation = {
            name: ((part + 0.5) * 255 if part.ndim == 4 else part).unflatten(0, window.shape)
            for name, part in self.model.decode(feature).items()
        }
        reward = as_float32(self.model.reward_model(feature))
        return observation, reward.unflatten(0, window.shape)

    def dream_model(self) -> WorldModel:
        """Return the world model, for `env=dream`."""
        return self.model

    def update(self, batch: TensorDictBase) -> None:
        """Update world model, actor and critic once each, on sequences `[B, T]`."""
        kl, loss, start, terms = self.model_loss(batch)
        model_loss = self.kl_scale * self.with_free_nats(kl) + loss
        self.step(self.model_optimizer, model_loss, self.max_grad_norm)
        with freeze([*self.model_parameters, *self.critic_parameters]):
            actor_loss, feature, target, weight, entropy = self.imagination_losses(start)
            self.step(self.actor_optimizer, actor_loss, self.max_grad_norm)
        value_loss = self.value_loss(feature, target, weight)
        self.step(self.critic_optimizer, value_loss, self.max_grad_norm)
        self.record(model_loss=model_loss, actor_loss=actor_loss, value_loss=value_loss, **terms)
        self.record(imagined_return=target.mean())
        if self.actor.one_hot is not None:
            self.record(entropy=entropy)

    def with_free_nats(self, kl: Tensor) -> Tensor:
        """Return max(E KL, free nats), comparing the mean KL over all ranks."""
        return torch.where(distributed.all_reduce_mean(kl.detach()) > self.free_nats, kl, self.free_nats)

    def model_loss(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return E KL(q || p) and E[-log p(o|s) - log p(r|s) - continue_scale log p(continue|s)] over `[B, T]`, Eq. 10.

        p(o|s) and p(r|s) are Gaussians of variance 1, without their constants. The target of the continue model is
        gamma (1 - terminated).

        Returns:
            The KL; the sum of the other terms; the states `[B T, *]` that imagination starts from, without a gradient,
            with `alive`, false where the episode has terminated; and the terms as metrics.
        """
        states, posterior, prior = self.model.observe_sequence(batch["observation"], batch["action"], batch["is_first"])
        feature = states.feature.flatten(0, 1)  # [B, T, F] -> [B T, F]
        observation, reward, is_terminal = (
            batch[key].flatten(0, 1) for key in ("observation", "reward", "is_terminal")
        )
        kl = posterior.kl(prior).mean()
        decoded = self.model.decode(feature)
        observation_loss = torch.stack(
            [
                (0.5 * (decoded[name] - center_pixels(part)).square().flatten(1)).sum(-1).mean()
                for name, part in self.model.observation_parts(observation).items()
            ]
        ).sum()
        reward_loss = 0.5 * (as_float32(self.model.reward_model(feature)) - reward).square().mean()
        loss = observation_loss + reward_loss
        terms = {"kl": kl.detach(), "observation_loss": observation_loss.detach(), "reward_loss": reward_loss.detach()}
        if self.model.continue_model is not None:
            logit = as_float32(self.model.continue_model(feature))
            continue_loss = binary_cross_entropy_with_logits(logit, self.gamma * (~is_terminal).float())
            loss, terms["continue_loss"] = loss + self.continue_scale * continue_loss, continue_loss.detach()
        start = {name: part.detach().flatten(0, 1) for name, part in states._asdict().items()}
        return kl, loss, start | {"alive": ~is_terminal}, terms

    def imagination_losses(self, start: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Imagine trajectories from the start states of `model_loss`; return the actor loss and the critic's data.

        Trajectories that start where an episode has terminated get weight 0.

        Returns:
            The actor loss; features `[N, H-1, F]`, targets and weights `[N, H-1, 1]` for the critic; and the entropy.
        """
        feature, action, policy_input = self.imagine(State(start["deter"], start["stoch"]))
        target, weight = self.lambda_return(feature)
        weight = weight * start["alive"].unsqueeze(1)  # [N, 1] -> [N, 1, 1]
        loss, entropy = self.actor_loss(feature, action, policy_input, target, weight)
        return loss, feature[:, :-1].detach(), target.detach(), weight, entropy

    def imagine(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """Imagine H steps of the policy in the transition model, from states `[N, *]`.

        The start states themselves are not part of the output. The policy has no gradient with respect to its input.

        Returns:
            Features `[N, H, F]`, with a gradient through model and actions; for each of them the sample `[N, H, A]` of
            the action that led to it, as `log_prob_of_draw` takes it; and the policy's input `[N, H, F]` for that
            action.
        """
        features, actions, policy_inputs = [], [], []
        for _ in range(self.horizon):
            policy_inputs.append(state.feature.detach())
            draw, action = self.actor(policy_inputs[-1]).draw()
            state = self.model.imagine_step(state, action if self.actor_gradient == "dynamics" else action.detach())
            features.append(state.feature)
            actions.append(draw)
        return torch.stack(features, 1), torch.stack(actions, 1), torch.stack(policy_inputs, 1)

    def lambda_return(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Return V_lambda(s_t) = r_t + c_t ((1 - lambda) v(s_{t+1}) + lambda V_lambda(s_{t+1})), t < H, Eq. 6.

        V_lambda(s_H) is v(s_H). c is gamma, or the continue model's prediction. Also return the weight of each step,
        the product of the c before it. Both are `[N, H-1, 1]`.
        """
        reward, value = as_float32(self.model.reward_model(feature)), as_float32(self.critic(feature))
        if self.model.continue_model is None:
            continues = torch.full_like(reward, self.gamma)
        else:
            continues = as_float32(self.model.continue_model(feature)).sigmoid()
        one_step = reward[:, :-1] + continues[:, :-1] * (1 - self.return_lambda) * value[:, 1:]
        decay = self.return_lambda * continues[:, :-1]
        target = returns.discounted_sum(torch.cat([one_step, value[:, -1:]], 1), torch.cat([decay, decay[:, -1:]], 1))
        weight = torch.cat([torch.ones_like(continues[:, :1]), continues[:, :-2]], 1).detach().cumprod(1)
        return target[:, :-1], weight

    def actor_loss(
        self, feature: Tensor, action: Tensor, policy_input: Tensor, target: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the actor loss and the policy's entropy (0 for continuous actions).

        `dynamics`: -E[weight V_lambda], differentiated through the imagined trajectory, Eq. 7.
        `reinforce`: -E[weight log pi(a_t|s_t) (V_lambda(s_{t+1}) - b(s_t))], where a_t leads to s_{t+1}.
        With discrete actions, `entropy_coef` times the entropy is subtracted from either.
        """
        entropy = torch.zeros((), device=feature.device)
        needs_policy = self.actor_gradient == "reinforce" or self.actor.one_hot is not None
        policy = self.actor(policy_input[:, :-1]) if needs_policy else None
        if self.actor_gradient == "reinforce":
            assert policy is not None
            advantage = (target - self.baseline(policy_input[:, :-1])).detach()
            loss = -(weight * policy.log_prob_of_draw(action[:, :-1].detach()) * advantage).mean()
        else:
            loss = -(weight * target).mean()
        if isinstance(policy, OneHotAction):
            entropy = (weight * policy.entropy()).mean() / weight.mean().clamp(min=1e-8)
            loss = loss - self.entropy_coef * entropy
        return loss, entropy.detach()

    def baseline(self, feature: Tensor) -> Tensor:
        """Return b(s_t) = (v(s_t) - r_t) / c_t, the expected V_lambda(s_{t+1}): `[N, H-1, 1]`."""
        reward, value = as_float32(self.model.reward_model(feature)), as_float32(self.critic(feature))
        if self.model.continue_model is None:
            return (value - reward) / self.gamma
        return (value - reward) / as_float32(self.model.continue_model(feature)).sigmoid().clamp(min=0.1)

    def value_loss(self, feature: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Return the critic loss E[weight (v(s_t) - V_lambda(s_t))^2 / 2], Eq. 8; the gradient reaches v only."""
        return 0.5 * (weight * (as_float32(self.critic(feature)) - target).square()).mean()
