"""DreamerV3 (Hafner et al. 2023, arXiv:2301.04104v1): one configuration for all domains.

Like Dreamer, it learns a world model from replay and a policy from trajectories imagined in that model. Its changes
make it robust: the latent state is categorical; observations, rewards and values of any scale are handled by symlog,
two-hot distributions and return normalisation; and by default the policy is trained with the score function, not by
backpropagation through the imagined trajectory.

Pseudocode:

    for each env step:
        s ~ q(s | s_before, a_before, o);  a ~ pi(a|s);  D <- D + {(o, a, r, ..., s)}
    for each update:
        sample B sequences of T records from D, each with the state before it
        world model:  L_m = -log p(o|s) - log p(r|s) - log p(c|s) + max(1, KL(sg q || p)) + 0.1 max(1, KL(q || sg p))
        from each of the B T states imagine H steps: a ~ pi(a|s), s' ~ p(s'|s,a)                        imagine
        R_t = r_{t+1} + c_{t+1} ((1 - lambda) v(s_{t+1}) + lambda R_{t+1}),  R_H = v(s_H)               Eq. 7
        S <- 0.99 S + 0.01 (P95(R) - P5(R))                                                             Eq. 12
        actor:   L_a = -sum_t w_t [log pi(a_t|s_t) sg((R_t - v(s_t)) / max(1, S)) + eta H(pi(.|s_t))]   Eq. 11
        critic:  L_v = -sum_t w_t [log p_v(R_t | s_t) + log p_v(v_slow(s_t) | s_t)]                     Eq. 10
        L_v <- L_v + 0.3 times the same loss on replayed rewards, bootstrapped from the imagined return R_0
        theta <- LaProp(L_m + L_a + L_v);  slow critic <- 0.02 critic + 0.98 slow critic
        replace the states stored in D for these sequences by the states computed here

Deviations:
    - An iteration is a few vector steps, then the updates due by `replay_ratio`, whose sequences are sampled together.
    - Sequences are sampled uniformly; the published code first samples each new sequence once, as soon as it is stored.
    - Replay stores states in bfloat16, and one million records instead of five.
    - Deterministic actions are the mode of pi at the mean of q: a sample of q adds noise, and its mode misses slow
      changes.
    - Each parameter's gradient is clipped by that parameter's norm, and some layers are split into parameters
      differently here: the GRU's first layer is three matrices, the posterior's first layer is two, and the policy's
      mean and std share one.
    - Each part of a dict observation has its own encoder and decoder.
    - A discrete policy is mixed with 1% uniform, as in the paper; in today's published code `unimix` has no effect.

Metrics:
    train/kl: KL(q || p), nats, before it is clamped.
    train/observation_loss: squared error of the observation, summed over its entries; vectors after symlog.
    train/reward_loss: cross-entropy of the reward.
    train/continue_loss: cross-entropy of the continue model.
    train/actor_loss: L_a.
    train/value_loss: L_v on imagined trajectories.
    train/replay_value_loss: L_v on replayed rewards, before the factor 0.3.
    train/imagined_return: E[R_0].
    train/return_scale: max(1, S).
    train/entropy: entropy of pi, nats.
    train/prior_entropy, train/posterior_entropy: entropy of p and of q, nats.
    train/clipped: fraction of parameters whose gradient was clipped.
    eval/open_loop_5, ...: errors of open-loop predictions, see `levin.model_based.open_loop`.
"""

from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import Optimizer

from levin.algorithms.base import Algorithm, Batch
from levin.algorithms.dreamer_v3_networks import BINS, SIZES, Policy, categorical_kl, output_head, symexp, symlog
from levin.algorithms.dreamer_v3_world_model_networks import WorldModel
from levin.core import distributed
from levin.core.errors import ConfigError
from levin.core.spaces import IS_FIRST, EnvSpec
from levin.core.types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from levin.data import returns
from levin.data.sequences import LATENT, SequenceReplay, check_learning_starts
from levin.estimators import GumbelSoftmax, ReinMax, StraightThrough
from levin.model_based import open_loop
from levin.model_based.recurrent import Carry, RecurrentPolicy, State, stack_steps
from levin.nn.layers import as_float32
from levin.nn.optimizers import LaProp
from levin.nn.parameters import freeze

ESTIMATORS = {"straight_through": StraightThrough(), "reinmax": ReinMax(), "gumbel_softmax": GumbelSoftmax(hard=True)}


class DreamerV3(Algorithm):
    """A world model with categorical states, and an actor-critic trained on trajectories imagined in it.

    Numbers in `Args` are those of the published code, https://github.com/danijar/dreamerv3, for state vectors of DM
    Control.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        gamma: Discount: 1 - 1/333.
        return_lambda: Decay of the lambda-return: 0.95.
        horizon: Imagined steps, H: 15.
        batch_size: Sequences per update, B: 16.
        batch_length: Records per sequence, T: 64.
        size: Size of the networks: `1m` to `200m` parameters, or `micro`.
        latent_estimator: Estimator of the gradient through sampled states: `straight_through`.
        actor_gradient: `reinforce`: score function; `dynamics`: backpropagate through the imagined trajectory, as in
            Dreamer.
        entropy_coef: Weight of the policy's entropy, eta: 3e-4.
        free_nats: KL below which there is no KL loss, nats, for each state: 1.
        dynamics_scale: Weight of the KL that trains p: 1.
        representation_scale: Weight of the KL that trains q: 0.1.
        replay_value_scale: Weight of the critic's loss on replayed rewards: 0.3.
        slow_tau: Step of the slow critic towards the critic: 0.02.
        return_decay: Decay of the moving averages of the return percentiles: 0.99.
        lr: Learning rate of LaProp: 4e-5.
        warm_up: Updates over which the learning rate rises from 0 to `lr`: 1000.
        clip: Largest gradient norm of a parameter, relative to the parameter's own norm: 0.3.
        replay_ratio: Updates per env step: 1, their train ratio of 1024 divided by the 1024 records of a batch.
        learning_starts: Env steps before the first update, enough for one sequence of each env.
        buffer_size: Records kept in replay.
        buffer_storage: `memory`, or `memmap` for a file.
        steps_per_iteration: Vector steps between two rounds of updates.
        compile: Compile the single steps of the world model and, on a GPU, capture the whole update as a CUDA graph;
            compiling takes minutes, and results differ by rounding.
    """

    actions: ClassVar = ("box", "discrete")
    actor: Policy  # takes features of the world model
    observations: ClassVar = ("float32", "uint8")
    normalization: ClassVar = False
    buffer: SequenceReplay
    return_range: Tensor  # [2]: moving averages of the return percentiles
    percentiles: Tensor  # [2]: the percentiles, as fractions

    def __init__(
        self,
        *,
        env: EnvSpec,
        gamma: Fraction = 1 - 1 / 333,
        return_lambda: Fraction = 0.95,
        horizon: PositiveInt = 15,
        batch_size: PositiveInt = 16,
        batch_length: PositiveInt = 64,
        size: Literal["micro", "1m", "12m", "25m", "50m", "100m", "200m"] = "1m",
        latent_estimator: Literal["straight_through", "reinmax", "gumbel_softmax"] = "straight_through",
        actor_gradient: Literal["reinforce", "dynamics"] = "reinforce",
        entropy_coef: NonNegativeFloat = 3e-4,
        free_nats: NonNegativeFloat = 1.0,
        dynamics_scale: NonNegativeFloat = 1.0,
        representation_scale: NonNegativeFloat = 0.1,
        replay_value_scale: NonNegativeFloat = 0.3,
        slow_tau: Fraction = 0.02,
        return_decay: Fraction = 0.99,
        lr: PositiveFloat = 4e-5,
        warm_up: NonNegativeInt = 1000,
        clip: PositiveFloat = 0.3,
        replay_ratio: NonNegativeFloat = 1.0,
        learning_starts: NonNegativeInt = 1100,
        buffer_size: PositiveInt = 1_000_000,
        buffer_storage: Literal["memory", "memmap"] = "memory",
        steps_per_iteration: PositiveInt = 4,
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__(env, gamma)
        if buffer_size // env["num_envs"] <= batch_length:
            raise ConfigError(
                f"algo.buffer_size={buffer_size} is too small for one sequence of each env: it must be at least "
                f"{(batch_length + 1) * env['num_envs']}"
            )
        if batch_length < 2:
            raise ConfigError(
                "algo.batch_length=1 is too short: values are learned from two successive records, so it must be at "
                "least 2"
            )
        check_learning_starts(learning_starts, (batch_length + 1) * env["num_envs"])
        self.gamma, self.return_lambda, self.horizon = gamma, return_lambda, horizon
        self.batch_size, self.batch_length, self.replay_ratio = batch_size, batch_length, replay_ratio
        self.dream_steps_per_update = batch_size * batch_length * horizon
        self.learning_starts, self.steps_per_iteration = learning_starts, steps_per_iteration
        self.actor_gradient, self.entropy_coef, self.free_nats = actor_gradient, entropy_coef, free_nats
        self.dynamics_scale, self.representation_scale = dynamics_scale, representation_scale
        self.replay_value_scale, self.slow_tau, self.return_decay = replay_value_scale, slow_tau, return_decay
        self.lr, self.warm_up, self.clip = lr, warm_up, clip

        widths = SIZES[size]
        self.model = WorldModel(env, size=widths, estimator=ESTIMATORS[latent_estimator], gamma=gamma)
        self.actor = Policy(self.model.features, env, widths.units)
        self.critic = output_head(self.model.features, widths.units, 3, BINS, scale=0.0)
        self.slow_critic = deepcopy(self.critic).requires_grad_(False)
        self.two_hot = self.model.two_hot
        self.register_buffer("return_range", torch.zeros(2))
        self.register_buffer("percentiles", torch.tensor([0.05, 0.95]), persistent=False)
        self.carry = Carry(env["num_envs"], self.model)
        self.buffer = SequenceReplay(env, buffer_size, buffer_storage, batch_length + 1, keeps_latents=True)
        self.observe_step, self.imagine_step = self.model.observe_step, self.model.imagine_step
        if compile:
            self.compile_losses("observe_step", "imagine_step")
            self.capture("update")

    def configure_optimizers(self) -> Optimizer:
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.optimizer = LaProp(trainable, lr=self.lr, clip=self.clip, warm_up=self.warm_up)
        return self.optimizer

    def policy(self, *, deterministic: bool = False) -> TensorDictModule:
        carry = Carry(0, self.model).to(self.device) if deterministic else self.carry
        keeps = None if deterministic else self.model.pack
        policy = RecurrentPolicy(self.model, self.actor, carry, deterministic=deterministic, keeps=keeps)
        out_keys: list[NestedKey] = ["action"] if deterministic else ["action", LATENT]
        return TensorDictModule(policy, in_keys=["observation", IS_FIRST], out_keys=out_keys)

    def on_train_start(self) -> None:
        super().on_train_start()
        check_learning_starts(
            self.learning_starts, (self.batch_length + 1) * self.env["num_envs"] * distributed.world_size()
        )

    def training_step(self, rollout: TensorDictBase, _: int) -> None:
        self.buffer.extend(rollout)
        for batch in self.replay():
            self.buffer.overwrite_latents(batch, self.update(batch))

    def on_evaluation(self, folder: Path) -> dict[str, float]:
        if len(self.buffer) <= self.batch_length:
            return {}
        return open_loop.evaluate_open_loop(
            self.buffer, self.device, self.predict_open_loop, folder / f"{self.env_steps}.png"
        )

    def predict_open_loop(self, window: TensorDict) -> tuple[dict[str, Tensor], Tensor]:
        """Return predicted observations and rewards of windows `[B, L]`.

        The first state is the stored one. The model then reads the observations up to record `CONTEXT`, and after that
        only the actions.
        """
        first = self.model.unpack(window[LATENT][:, 0])
        observation, is_first = (window[key][:, 1 : open_loop.CONTEXT] for key in ("observation", "is_first"))
        previous_action = window["action"][:, : open_loop.CONTEXT - 1]
        states, _ = self.model.observe_sequence(self.model.observe_step, first, observation, previous_action, is_first)
        path = [first, *(State(*parts) for parts in zip(*(part.unbind(1) for part in states), strict=True))]
        for t in range(open_loop.CONTEXT - 1, window.shape[1] - 1):
            path.append(State(*self.model.imagine_step(*path[-1], window["action"][:, t])))
        state = State(*(part.flatten(0, 1) for part in stack_steps(path)))
        predicted = {
            name: (part * 255 if part.ndim == 4 else symexp(part)).unflatten(0, window.shape)
            for name, part in self.model.decode(state).items()
        }
        reward = self.two_hot.mean(as_float32(self.model.reward_model(state.feature)))
        return predicted, reward.unflatten(0, window.shape)

    def dream_model(self) -> WorldModel:
        """Return the world model, for `env=dream`."""
        return self.model

    def update(self, batch: TensorDictBase) -> Tensor:
        """Update all networks once on sequences `[B, 1 + T]`; return the new states `[B, T, *]` as replay stores them.

        Only the state and the action of the first record of each sequence are used.
        """
        state, posterior = self.observe(batch)
        model_loss, terms = self.model_loss(batch, state, posterior)
        feature, log_prob, entropy = self.imagine(State(*(part.detach().flatten(0, 1) for part in state)))
        logits = self.critic(feature.detach())
        target, value, weight = self.lambda_return(feature, logits)
        scale = self.return_scale(target)
        actor_loss = self.actor_loss(log_prob, entropy, target / scale, value / scale, weight)
        value_loss = self.value_loss(logits[:, :-1], feature[:, :-1].detach(), target.detach(), weight)
        replay_value_loss = self.replay_value_loss(batch, state, target[:, 0].detach())
        loss = model_loss + actor_loss + value_loss + self.replay_value_scale * replay_value_loss
        self.step(self.optimizer, loss)
        self.update_slow_critic()
        self.record(actor_loss=actor_loss, value_loss=value_loss, replay_value_loss=replay_value_loss, **terms)
        self.record(imagined_return=target[:, 0].mean(), return_scale=scale, entropy=entropy.mean())
        self.record(clipped=self.optimizer.clipped)
        return self.model.pack(state)

    def observe(self, batch: Batch) -> tuple[State, Tensor]:
        """Return the states `[B, T, *]` of all records but the first, and their posteriors `[B, T, S, K]`."""
        # It requires a gradient as all later states do, so that all calls of `observe_step` are alike
        first = State(*(part.requires_grad_() for part in self.model.unpack(batch[LATENT][:, 0])))
        observation, is_first = batch["observation"][:, 1:], batch["is_first"][:, 1:]
        return self.model.observe_sequence(self.observe_step, first, observation, batch["action"][:, :-1], is_first)

    def model_loss(self, batch: Batch, state: State, posterior: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return E[-log p(o|s) - log p(r|s) - log p(c|s) + max(1, KL(sg q || p)) + 0.1 max(1, KL(q || sg p))].

        Eq. 4 and 5. The KL is summed over the categoricals of a state and then clamped. The target of the continue
        model is gamma (1 - terminated), so it includes the discount. Also return the terms as metrics.
        """
        observation, reward, is_terminal = (batch[key][:, 1:] for key in ("observation", "reward", "is_terminal"))
        flat = State(*(part.flatten(0, 1) for part in state))  # [B, T, *] -> [B T, *]
        prior = self.model.prior(flat.deter).unflatten(0, state.deter.shape[:2])
        kl = categorical_kl(posterior.detach(), prior)
        dynamics = kl.clamp(min=self.free_nats).mean()
        representation = categorical_kl(posterior, prior.detach()).clamp(min=self.free_nats).mean()
        observation_loss = self.observation_loss(
            self.model.decode(flat), self.model.observation_parts(observation.flatten(0, 1))
        )
        feature = flat.feature
        reward_log_probs = as_float32(self.model.reward_model(feature)).log_softmax(-1)
        reward_loss = self.two_hot.loss(reward_log_probs, reward.flatten(0, 1)).mean()
        continues = self.gamma * (~is_terminal).float().flatten(0, 1)
        continue_loss = binary_cross_entropy_with_logits(as_float32(self.model.continue_model(feature)), continues)
        loss = observation_loss + reward_loss + continue_loss
        loss = loss + self.dynamics_scale * dynamics + self.representation_scale * representation
        terms = {"observation_loss": observation_loss, "reward_loss": reward_loss, "continue_loss": continue_loss}
        terms |= {
            "kl": kl.mean(),
            "prior_entropy": latent_entropy(prior),
            "posterior_entropy": latent_entropy(posterior),
        }
        return loss, {name: term.detach() for name, term in terms.items()}

    def observation_loss(self, decoded: dict[str, Tensor], observation: dict[str, Tensor]) -> Tensor:
        """Return the squared error summed over an observation's entries: pixels in [0, 1], vectors after symlog."""
        losses = []
        for name, part in observation.items():
            target = part.float() / 255 if part.dtype == torch.uint8 else symlog(part)
            losses.append((decoded[name] - target).square().flatten(1).sum(1).mean())
        return torch.stack(losses).sum()

    def imagine(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """Imagine H steps of the policy in the transition model, from states `[N, *]`.

        The policy has no gradient with respect to its input.

        Returns:
            Features `[N, H + 1, F]`, beginning with those of the start states, with a gradient only for `dynamics`;
            log pi(a_t|s_t) and the entropy of pi at the first H of them, `[N, H, 1]` each.
        """
        dynamics = self.actor_gradient == "dynamics"
        # The start states require a gradient if later states do, so that all calls of `imagine_step` are alike
        state = State(*(part.requires_grad_(dynamics) for part in state))
        features, log_probs, entropies = [state.feature], [], []
        with freeze(self.model.parameters()):
            for _ in range(self.horizon):
                policy = self.actor(features[-1].detach())
                action = policy.sample()
                with nullcontext() if dynamics else torch.no_grad():
                    state = State(*self.imagine_step(*state, action))
                features.append(state.feature)
                log_probs.append(policy.log_prob(action.detach()))
                entropies.append(policy.entropy())
        return torch.stack(features, 1), torch.stack(log_probs, 1), torch.stack(entropies, 1)

    def lambda_return(self, feature: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return R_t = r_{t+1} + c_{t+1} ((1 - lambda) v(s_{t+1}) + lambda R_{t+1}), R_H = v(s_H), t < H; Eq. 7.

        Also return v(s_t), and the weight of each step: the product of the c up to and including c_t, so that a
        trajectory which starts in a terminal state has little weight. All are `[N, H, 1]`.

        Args:
            feature: Features of the imagined states, `[N, H + 1, F]`.
            logits: The critic's outputs for the detached features, `[N, H + 1, 255]`.
        """
        with freeze([*self.model.parameters(), *self.critic.parameters()]):
            dynamics = self.actor_gradient == "dynamics"
            value = self.two_hot.mean(as_float32(self.critic(feature) if dynamics else logits.detach()))
            reward = self.two_hot.mean(as_float32(self.model.reward_model(feature[:, 1:])))
            continues = as_float32(self.model.continue_model(feature)).sigmoid()
        next_continues = continues[:, 1:]
        one_step = reward + next_continues * (1 - self.return_lambda) * value[:, 1:]
        decay = self.return_lambda * next_continues
        target = returns.discounted_sum(torch.cat([one_step, value[:, -1:]], 1), torch.cat([decay, decay[:, -1:]], 1))
        return target[:, :-1], value[:, :-1], continues[:, :-1].detach().cumprod(1)

    @torch.no_grad()
    def return_scale(self, target: Tensor) -> Tensor:
        """Update S, the moving average of P95(R) - P5(R) over all ranks, and return max(1, S); Eq. 12."""
        quantiles = torch.quantile(distributed.all_gather(target.detach().flatten()), self.percentiles)
        self.return_range.lerp_(quantiles, 1 - self.return_decay)
        return (self.return_range[1] - self.return_range[0]).clamp(min=1.0)

    def actor_loss(self, log_prob: Tensor, entropy: Tensor, target: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        """Return -E[w_t (log pi(a_t|s_t) sg(R_t - v(s_t)) + eta H(pi(.|s_t)))], Eq. 11.

        `dynamics`: R_t replaces the first term, differentiated through the imagined trajectory. All arguments are
        `[N, H, 1]`; target and value are already divided by the return scale.
        """
        gain = target if self.actor_gradient == "dynamics" else log_prob * (target - value).detach()
        return -(weight * (gain + self.entropy_coef * entropy)).mean()

    def value_loss(self, logits: Tensor, feature: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Return -E[w_t (log p_v(R_t | s_t) + log p_v(v_slow(s_t) | s_t))], Eq. 10; logits `[..., 255]`."""
        with torch.no_grad():
            slow = self.two_hot.mean(as_float32(self.slow_critic(feature)))
        log_probs = as_float32(logits).log_softmax(-1)
        return (weight * (self.two_hot.loss(log_probs, target) + self.two_hot.loss(log_probs, slow))).mean()

    def replay_value_loss(self, batch: Batch, state: State, imagined: Tensor) -> Tensor:
        """Return the value loss on replayed rewards.

        R_t = r_{t+1} + gamma (1 - terminated) ((1 - l) R'_{t+1} + l R_{t+1})

        R' `[B T, 1]` is the imagined return from each state; l is lambda, or 0 where an episode ends. The last record
        of an episode is left out. The gradient reaches the critic and, through the states, the world model.
        """
        reward, is_terminal, is_last = (batch[key][:, 1:] for key in ("reward", "is_terminal", "is_last"))
        # An episode that a resume cut off has no `is_last`: the next record's `is_first` marks its end
        is_last = torch.cat([is_last[:, :-1] | batch["is_first"][:, 2:], is_last[:, -1:]], 1)
        imagined = imagined.unflatten(0, reward.shape[:2])  # [B T, 1] -> [B, T, 1]
        discount = self.gamma * (~is_terminal[:, 1:]).float()
        lambda_ = self.return_lambda * (~is_last[:, 1:]).float()
        one_step = reward[:, 1:] + discount * (1 - lambda_) * imagined[:, 1:]
        decay = discount * lambda_
        target = returns.discounted_sum(
            torch.cat([one_step, imagined[:, -1:]], 1), torch.cat([decay, decay[:, -1:]], 1)
        )
        feature = state.feature[:, :-1]
        return self.value_loss(self.critic(feature), feature.detach(), target[:, :-1], (~is_last[:, :-1]).float())

    @torch.no_grad()
    def update_slow_critic(self) -> None:
        """Update the slow critic: slow <- tau critic + (1 - tau) slow."""
        torch._foreach_lerp_(list(self.slow_critic.parameters()), list(self.critic.parameters()), self.slow_tau)


def latent_entropy(log_probs: Tensor) -> Tensor:
    """Return the entropy of categoricals `[..., S, K]`, nats, summed over S and averaged over all states."""
    return -(log_probs.exp() * log_probs).sum((-1, -2)).mean()
