"""Judge anybody's ring, collective or dilated attention: what is wrong, where, and most likely why.

    from ringref.oracle import check
    report = check(my_attention, layout="zigzag", ranks=4, features={"causal", "gqa"})

The candidate is `fn(q, k, v, *, causal, group) -> out | (out, lse)` on local shards `b s h d`. It runs on real
processes with whatever communication it uses itself; nothing of it is trusted. A case is a small problem, cut
across p ranks by `layout`; the judge is `dense_attention` on the whole problem in float64. A feature may add keywords
to the call:

| feature | adds | meaning |
|---|---|---|
| causal | | a query sees its own position and those before; `causal=False` is judged always |
| gqa | | fewer key/value heads than query heads: head j uses j // (h/g) |
| mask | `mask_mod` | FlexAttention's signature, over global indices |
| score_mod | `score_mod` | FlexAttention's signature: the score, already scaled, and global indices |
| window | `window` | `(left, right)`: key − query between −left and right |
| cu_seqlens | `cu_seqlens` | documents packed into the sequence: int32, 0 … n, the same on all ranks |
| dilation | `dilation` | a `ringref.Dilation` |
| scale | `scale` | what scores are multiplied by, instead of 1/√d |
| sink | `sink` | a logit per query head: a key that all see, of value 0; its gradient is of own rows, or summed |
| value_dim | | v and out have a head dim of their own |
| kv | `positions`, `kv_positions` | queries are not the keys: cross-attention, chunked prefill, one replicated query |
| uneven, empty | `positions` | this rank's global positions; lengths differ, or are zero |
| lse | | the second result is a differentiable lse; its gradient is judged too |
| subgroup | | `group` is not the world |
| deterministic | | two equal steps agree to the bit |

`layout` may be a function (n, p, rank) -> positions; −1 is a row of padding: anything comes in, anything may come out.
Who cannot tell these rows by their number declares `uneven`, and is told `positions`, −1 for padding.

**Budget.** A tensor's error is ‖candidate − float64‖ / ‖float64‖ on its rank. It may be `MULTIPLE` times the error
that plain PyTorch attention makes in the same dtype on the same inputs on that rank (float64 is granted float32's
error: many accumulate in float32 on purpose), and never less than `FLOOR` machine epsilons are granted.
"""

from . import adapt
from .cases import FEATURES, Case, cases
from .judge import Judge, check
from .pool import Pool
from .report import Finding, Report
from .truth import Truth

__all__ = ["FEATURES", "Case", "Finding", "Judge", "Pool", "Report", "Truth", "adapt", "cases", "check"]
