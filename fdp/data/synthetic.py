"""Data whose laws are known exactly: Markov chains (likelihood, entropy and posterior under any
mask) and Gaussian mixtures of images (the denoiser at any noise level).

Shapes: B sequences or images, L positions, n states (ids 0..n-1; id n is the mask token), P powers
of the transition matrix; H rows, W columns, C channels, K components of a mixture."""

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from fdp.data.batches import Arrays, Batch, Data, Windows
from fdp.data.images import DIMS
from fdp.data.tokenizer import Tokenizer, decoder

NEVER = -1e30  # log of an impossible event: finite, so that its product with 0 is 0


@lru_cache(maxsize=8)
def _transitions(n: int, concentration: float, seed: int) -> np.ndarray:
    """Row-stochastic matrix with Dirichlet rows: f64 [n, n]."""
    return np.random.RandomState(seed).dirichlet(np.full(n, concentration), size=n)


@lru_cache(maxsize=8)
def _log_powers(chain: "MarkovChain", length: int) -> np.ndarray:
    """log T^0 .. log T^length, multiplied in f64 and floored at log 1e-300: f64 [length + 1, n,
    n].
    """
    powers = [np.eye(chain.n)]
    for _ in range(length):
        powers.append(powers[-1] @ chain.transitions)
    return np.log(np.maximum(np.stack(powers), 1e-300))


@dataclass(frozen=True)
class MarkovChain:
    """First-order chain T ~ Dirichlet(concentration)^n with a stationary start; a pure function of
    its three fields."""

    n: int = 27
    concentration: float = 0.15
    seed: int = 0

    @property
    def transitions(self) -> np.ndarray:
        """T[u, v] = p(next = v | u): f64 [n, n]."""
        return _transitions(self.n, self.concentration, self.seed)

    @cached_property
    def stationary(self) -> np.ndarray:
        """π with πT = π, the distribution of every position: f64 [n]."""
        system = np.vstack([self.transitions.T - np.eye(self.n), np.ones(self.n)])
        pi = np.linalg.lstsq(system, np.append(np.zeros(self.n), 1.0), rcond=None)[0]
        return np.clip(pi, 1e-300, None) / pi.sum()

    def sample(self, seed: int, step: int, batch: int, length: int) -> np.ndarray:
        """Batch number `step`: int32 [B, L], a pure function of (seed, step)."""
        u_BxL = np.random.default_rng([seed, step]).random((batch, length))
        cumulative = np.cumsum(self.transitions, axis=1)
        x_BxL = np.empty((batch, length), np.int32)
        x_BxL[:, 0] = np.searchsorted(np.cumsum(self.stationary), u_BxL[:, 0], side="right")
        np.minimum(x_BxL[:, 0], self.n - 1, out=x_BxL[:, 0])
        for i in range(1, length):
            # The last cumulative sum may round below 1; the last state takes what is left.
            beyond = u_BxL[:, i, None] >= cumulative[x_BxL[:, i - 1], :-1]
            x_BxL[:, i] = beyond.sum(1)
        return x_BxL

    def nll(self, x_BxL: np.ndarray) -> np.ndarray:
        """-log p(x) of whole sequences in nats: int [B, L] → f64 [B]. Infinite for an impossible
        step.
        """
        x_BxL = np.asarray(x_BxL)
        with np.errstate(divide="ignore"):
            steps = np.log(self.transitions)[x_BxL[:, :-1], x_BxL[:, 1:]]
        return -np.log(self.stationary)[x_BxL[:, 0]] - steps.sum(1)

    def entropy_rate(self) -> float:
        """h = -Σ π_u T_uv log T_uv in nats per token."""
        t = self.transitions
        return float(-(self.stationary[:, None] * t * np.log(np.maximum(t, 1e-300))).sum())

    def nll_floor(self, length: int) -> float:
        """Entropy of `length` tokens divided by `length`, in nats: no model's NLL or NELBO can be
        lower on average."""
        start = float(-(self.stationary * np.log(self.stationary)).sum())
        return (start + (length - 1) * self.entropy_rate()) / length

    def denoiser(self, z_BxL: jax.Array) -> jax.Array:
        """Exact log p(x_i | revealed tokens) for any mask pattern: int [B, L] with id n as mask →
        [B, L, n].

        Masked i between revealed u, `a` to the left, and w, `c` to the right: ∝ (T^a)[u, v]
        (T^c)[v, w]; π_v without a left neighbour, no factor without a right one. A revealed
        position is certain (0 and NEVER). f32, or f64 under `jax.enable_x64`. Jittable."""
        length = z_BxL.shape[1]
        log_powers = jnp.asarray(_log_powers(self, length))
        here_L = jnp.arange(length)
        revealed_BxL = z_BxL < self.n
        left_BxL = jax.lax.cummax(jnp.where(revealed_BxL, here_L, -1), axis=1)
        right_BxL = jax.lax.cummin(jnp.where(revealed_BxL, here_L, length), axis=1, reverse=True)
        u_BxL = jnp.take_along_axis(z_BxL, jnp.maximum(left_BxL, 0), axis=1)
        w_BxL = jnp.take_along_axis(z_BxL, jnp.minimum(right_BxL, length - 1), axis=1)
        # Ids that are not revealed are clipped: their factor is replaced just below.
        from_left = log_powers[here_L - left_BxL, jnp.minimum(u_BxL, self.n - 1)]
        to_right = log_powers[right_BxL - here_L, :, jnp.minimum(w_BxL, self.n - 1)]
        logp = jnp.where(
            (left_BxL >= 0)[..., None], from_left, jnp.log(jnp.asarray(self.stationary))
        )
        logp += jnp.where((right_BxL < length)[..., None], to_right, 0.0)
        certain = jnp.where(jnp.arange(self.n) == z_BxL[..., None], 0.0, NEVER)
        return jnp.where(revealed_BxL[..., None], certain, jax.nn.log_softmax(logp, axis=-1))


@dataclass(frozen=True)
class TwoRegimes(MarkovChain):
    """A slow coarse symbol and a fast fine one: state c·fine + f, of `n` = coarse·fine states.

    The coarse symbol stays with probability `stay`, else it is drawn anew. The fine symbol follows
    the one before it by a Dirichlet(concentration) chain of its own for each coarse symbol. Where
    much is masked only the coarse symbol can be told, from far away; where little is, the fine one,
    from its neighbours."""

    n: int = 24
    coarse: int = 4
    stay: float = 0.95

    @property
    def transitions(self) -> np.ndarray:
        """T[(c, f), (d, g)] = p(d | c) p_d(g | f): f64 [n, n]."""
        C, F = self.coarse, self.n // self.coarse
        slow_CxC = np.eye(C) * self.stay + (1 - self.stay) / C
        fast_CxFxF = _transitions(C * F, self.concentration, self.seed)[:, :F].reshape(C, F, F)
        fast_CxFxF = fast_CxFxF / fast_CxFxF.sum(-1, keepdims=True)
        whole = slow_CxC[:, None, :, None] * fast_CxFxF.transpose(1, 0, 2)[None]
        return whole.reshape(self.n, self.n)


CHAINS: dict[str, MarkovChain] = {"markov": MarkovChain(), "two_regimes": TwoRegimes()}


def markov_data(
    seq_len: int, train: int = 65_536, val: int = 2048, chain: MarkovChain | None = None
) -> Data:
    """Independent sequences of a Markov chain in place of a corpus, one per window: ids 0..n-1 are
    its states. `data.source` names one of CHAINS.

    The NLL of any sample is known exactly, and so is the lower bound of the NELBO."""
    chain = chain or MarkovChain()
    letters = [bytes([ord("a") + i]) for i in range(chain.n - 1)]
    tokenizer = Tokenizer(
        len(letters), lambda texts: [_states(text) for text in texts], decoder(letters), repr(chain)
    )
    parts = {"train": chain.sample(0, 0, train, seq_len), "val": chain.sample(1, 0, val, seq_len)}
    return Data(
        name=f"Markov chain of {chain.n} states, exact entropy {chain.nll_floor(seq_len):.4f} "
        "nats/token",
        sha256=hashlib.sha256(parts["train"].tobytes() + parts["val"].tobytes()).hexdigest(),
        licence="made here",
        tokenizer=tokenizer,
        train=Windows(parts["train"].reshape(-1), seq_len, "training sequences"),
        val=Windows(parts["val"].reshape(-1), seq_len, "validation sequences"),
        dims={"tokens": ("batch", "sequence")},
    )


def _states(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32) - ord("a")


@dataclass(frozen=True)
class GaussianMixture:
    """Images of `classes` equally likely kinds: a smooth random picture plus white noise of
    standard deviation `spread`; a pure function of its fields."""

    size: int = 8
    channels: int = 1
    classes: int = 4
    spread: float = 0.2
    seed: int = 0

    @property
    def means(self) -> np.ndarray:
        """The picture of every class, f64 [K, H, W, C], of root mean square 1/2."""
        rng, at = np.random.RandomState(self.seed), np.linspace(0, np.pi, self.size)
        wave = np.cos(at[:, None] * np.arange(3))  # H or W, frequency
        draw = rng.normal(size=(self.classes, 3, 3, self.channels))
        pictures = np.einsum("hi,wj,kijc->khwc", wave, wave, draw)
        return pictures / (2 * np.sqrt(np.square(pictures).mean((1, 2, 3), keepdims=True)))

    def sample(self, seed: int, count: int) -> Batch:
        """`count` images f32 [B, H, W, C] and labels int32 [B], a pure function of the seed."""
        rng = np.random.default_rng(seed)
        labels_B = rng.integers(0, self.classes, count, np.int32)
        noise = rng.normal(size=(count, self.size, self.size, self.channels))
        images = self.means[labels_B] + self.spread * noise
        return {"images": images.astype(np.float32), "labels": labels_B}

    def denoise(self, z: jax.Array, sigma_B: jax.Array, labels_B: jax.Array) -> jax.Array:
        """E[x | x + σε = z, label], exact: [B, H, W, C]. Label `classes` stands for none."""
        means, s2 = jnp.asarray(self.means, z.dtype), self.spread**2
        total_B = s2 + sigma_B**2
        off_BxK = jnp.square(z[:, None] - means).sum((2, 3, 4))
        known_BxK = labels_B[:, None] == jnp.arange(self.classes)
        possible_BxK = known_BxK | (labels_B == self.classes)[:, None]
        logits_BxK = jnp.where(possible_BxK, -off_BxK / (2 * total_B[:, None]), NEVER)
        mean = jnp.einsum("bk,khwc->bhwc", jax.nn.softmax(logits_BxK, axis=1), means)
        return mean + (s2 / total_B)[:, None, None, None] * (z - mean)

    def floor(self, sigma: float) -> float:
        """Least mean squared error per pixel of any denoiser that is told the label."""
        return self.spread**2 * sigma**2 / (self.spread**2 + sigma**2)


def mixture_data(mixture: GaussianMixture, train: int = 4096, val: int = 512) -> Data:
    """Images of a mixture in place of a data set."""
    parts = [mixture.sample(seed, count) for seed, count in enumerate((train, val))]
    content = b"".join(part[name].tobytes() for part in parts for name in sorted(part))
    first, second = (
        Arrays(part, f"{what} images", "draw more")
        for part, what in zip(parts, ("training", "validation"), strict=True)
    )
    digest = hashlib.sha256(content).hexdigest()
    return Data(repr(mixture), digest, "made here", None, first, second, DIMS)
