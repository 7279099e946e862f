"""Small named mistakes: one place of a correct source, changed as its author might have written it.

`old` occurs once in the base and `new` takes its place. The cause says what is wrong, not how it
shows. `racy` marks those whose numbers may come out right by luck of timing, of memory or of what ran
before, so that only watching is sure to see them; `hangs` those that wait for ever where they honestly would.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str
    base: str
    family: str
    slug: str
    cause: str
    old: str
    new: str
    passes_naive: bool = True  # what the field's usual test says; measured by test_zoo_self
    hangs: bool = False
    racy: bool = False


MERGING = [
    Mutant(
        "rotating_outputs_averaged",
        "rotating",
        "merging",
        "outputs-averaged",
        "The outputs of two blocks are averaged instead of weighted by their share of exp(lse).",
        """    out = out * per_query(torch.exp(lse - shift))
    out = out + block_out * per_query(torch.exp(block_lse - shift))
""",
        "    out = (out + block_out) / 2\n",
        passes_naive=False,
    ),
    Mutant(
        "dilated_ring_outputs_added",
        "dilated_ring",
        "merging",
        "outputs-added",
        "The normalised outputs of two results are added without their weights.",
        "    return out * mine[..., None] + other_out * theirs[..., None], both",
        "    return out + other_out, both",
        passes_naive=False,
    ),
    Mutant(
        "gathering_divides_by_lse",
        "gathering",
        "merging",
        "divided-by-lse",
        "The sum of exp(logit - max) V is divided by the lse instead of by exp(lse - max).",
        "out = (acc / norm.clamp_min(1e-30)).transpose(1, 2)",
        "out = (acc / lse[..., None]).transpose(1, 2)",
        passes_naive=False,
    ),
    Mutant(
        "rotating_log_of_sum_of_exp",
        "rotating",
        "merging",
        "lse-without-shift",
        "Two lse are merged as log(e^a + e^b) without subtracting the maximum, which overflows.",
        "    new = torch.logaddexp(lse, block_lse)\n",
        "    new = torch.log(torch.exp(lse) + torch.exp(block_lse))\n",
    ),
    Mutant(
        "rotating_base_two_lse",
        "rotating",
        "merging",
        "base-2-lse-merged-as-natural",
        "Each block's lse is in base 2 but is merged as a natural logarithm.",
        "    lse = (top + total.log()).squeeze(-1)\n",
        "    lse = (top / 0.6931471805599453 + total.log2()).squeeze(-1)\n",
        passes_naive=False,
    ),
    Mutant(
        "rotating_lse_starts_at_zero",
        "rotating",
        "merging",
        "zero-lse-for-nothing-seen",
        "The running lse starts at 0, which counts as one key of score 0, instead of -inf.",
        "lse = torch.full((b, h, s), -INF, dtype=acc, device=q.device)",
        "lse = torch.zeros((b, h, s), dtype=acc, device=q.device)",
        passes_naive=False,
    ),
    Mutant(
        "gathering_max_starts_at_zero",
        "gathering",
        "merging",
        "running-max-starts-at-zero",
        "The running maximum starts at 0, so rows whose scores are all very negative underflow.",
        "peak = q.new_full((batch, heads, s, 1), -math.inf, dtype=full)",
        "peak = q.new_zeros(batch, heads, s, 1, dtype=full)",
    ),
    Mutant(
        "rotating_merge_of_nothing",
        "rotating",
        "merging",
        "nan-when-nothing-seen",
        "Merging two results that saw no key computes exp(-inf + inf), which is NaN.",
        "    shift = new.masked_fill(new == -INF, 0.0)\n",
        "    shift = new\n",
    ),
    Mutant(
        "striped_empty_row",
        "striped",
        "merging",
        "nan-when-nothing-seen",
        "A row that sees nothing in a block subtracts an lse of -inf, which is NaN.",
        "            finite = lse.masked_fill(torch.isinf(lse), 0.0)\n",
        "            finite = lse\n",
        passes_naive=False,
    ),
    Mutant(
        "rotating_accumulates_in_input_dtype",
        "rotating",
        "merging",
        "accumulates-in-bf16",
        "The running out and lse, and all of backward, are kept in the input dtype (bf16).",
        "        acc = torch.float64 if q.dtype == torch.float64 else torch.float32\n",
        "        acc = q.dtype\n",
    ),
    Mutant(
        "rotating_keeps_last_lse",
        "rotating",
        "merging",
        "lse-not-updated",
        "The merge hands on the lse of the last block instead of the merged one.",
        "    return out, new\n",
        "    return out, block_lse\n",
    ),
    Mutant(
        "gathering_forgets_max",
        "gathering",
        "merging",
        "running-max-forgotten",
        "The running maximum becomes that of the last block, -inf if that block was all masked.",
        "new_peak = torch.maximum(peak, logits.amax(-1, keepdim=True))",
        "new_peak = logits.amax(-1, keepdim=True)",
    ),
    Mutant(
        "gathering_sum_not_rescaled",
        "gathering",
        "merging",
        "denominator-not-rescaled",
        "The running denominator is not rescaled when the running maximum grows.",
        "            norm = norm * fade + weight.sum(-1, keepdim=True)\n",
        "            norm = norm + weight.sum(-1, keepdim=True)\n",
        passes_naive=False,
    ),
    Mutant(
        "zigzag_lse_without_max",
        "zigzag",
        "merging",
        "lse-without-max",
        "The lse is the log of the shifted sum; the maximum is not added back.",
        "        lse = (top + total.log()).squeeze(-1)\n",
        "        lse = total.log().squeeze(-1)\n",
    ),
    Mutant(
        "rotating_one_shift_for_all",
        "rotating",
        "merging",
        "one-max-for-the-whole-block",
        "One maximum over batch, heads and rows shifts all scores, so rows far below it underflow.",
        "    top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)\n",
        "    top = logits.amax().clamp_min(torch.finfo(logits.dtype).min)\n",
    ),
    Mutant(
        "gathering_saves_lse_in_input_dtype",
        "gathering",
        "merging",
        "lse-saved-in-bf16",
        "The lse is saved for backward in the input dtype, so P = exp(S - lse) is off in bf16.",
        "ctx.save_for_backward(q, k, v, out, lse, positions)",
        "ctx.save_for_backward(q, k, v, out, lse.to(q.dtype), positions)",
    ),
]

MASKS = [
    Mutant(
        "rotating_local_causal",
        "rotating",
        "masks",
        "causal-in-local-coordinates",
        "The causal mask compares positions within the shards at every hop, not global ones.",
        "        keep = keep & (j <= i)\n",
        "        keep = keep & (j - j[..., :1] <= i - i[..., :1, :])\n",
        passes_naive=False,
    ),
    Mutant(
        "rotating_window_per_block",
        "rotating",
        "masks",
        "window-per-block",
        "The left edge of the window is measured within the shards, per block.",
        "            keep = keep & (j >= i - left)\n",
        "            keep = keep & (j - j[..., :1] >= i - i[..., :1, :] - left)\n",
    ),
    Mutant(
        "gathering_window_off_by_one",
        "gathering",
        "masks",
        "window-off-by-one",
        "The left edge of the window excludes the key at distance `left`.",
        "        keep &= distance <= window[0]\n",
        "        keep &= distance < window[0]\n",
    ),
    Mutant(
        "ulysses_right_window_is_left",
        "ulysses",
        "masks",
        "window-sides-confused",
        "The right side of the window uses the left size.",
        "            hidden = hidden | (j > i + right)\n",
        "            hidden = hidden | (j > i + left)\n",
    ),
    Mutant(
        "gathering_local_mask_mod",
        "gathering",
        "masks",
        "mask-mod-local-indices",
        "mask_mod is called with indices within the shards instead of global ones.",
        "index_q, index_k = q_pos[None, None, :, None], k_pos[None, None, None, :]",
        """index_q = torch.arange(len(q_pos), device=device)[None, None, :, None]
        index_k = torch.arange(len(k_pos), device=device)[None, None, None, :]""",
    ),
    Mutant(
        "gathering_mask_in_place",
        "gathering",
        "masks",
        "mask-written-in-place",
        "The causal mask is written into the tensor that mask_mod returned, which is the caller's.",
        "        keep = mask_mod(index_b, index_h, index_q, index_k) & keep\n",
        "        keep = mask_mod(index_b, index_h, index_q, index_k).logical_and_(keep)\n",
    ),
    Mutant(
        "collective_mask_of_first_sequence",
        "collective",
        "masks",
        "mask-batch-ignored",
        "mask_mod is called with batch index 0 for every sequence of the batch.",
        "        index_b = torch.arange(b, device=q.device).reshape(b, 1, 1, 1)\n",
        "        index_b = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=q.device)\n",
    ),
    Mutant(
        "collective_mask_columns_contiguous",
        "collective",
        "masks",
        "zigzag-treated-as-contiguous",
        "mask_mod takes the gathered zigzag keys to be in global order.",
        "rows.reshape(1, 1, -1, 1), cols.reshape(1, 1, 1, -1))",
        "rows.reshape(1, 1, -1, 1), cols.sort().values.reshape(1, 1, 1, -1))",
    ),
    Mutant(
        "collective_zigzag_as_contiguous",
        "collective",
        "masks",
        "zigzag-treated-as-contiguous",
        "The gathered zigzag keys are taken to be in global order.",
        "    cols = torch.cat([zigzag_positions(i, size, s) for i in range(size)]).to(q.device)\n",
        "    cols = torch.arange(size * s, device=q.device)\n",
        passes_naive=False,
    ),
    Mutant(
        "gathering_padding_attended",
        "gathering",
        "masks",
        "padding-attended",
        "The padding of the shorter shards is attended as if it were tokens at position 0.",
        "        longest = max(lengths)\n",
        "        longest = max(lengths)\n        lengths = [longest] * size\n",
    ),
    Mutant(
        "striped_wrong_source",
        "striped",
        "masks",
        "wrong-source-rank",
        "Hop t is taken to bring the block of rank + t, but it brings that of rank - t.",
        """            source = (ring.rank - hop) % ring.size
            keep = stripe_mask(s, ring.rank, source, causal, q.device)
""",
        """            source = (ring.rank + hop) % ring.size
            keep = stripe_mask(s, ring.rank, source, causal, q.device)
""",
    ),
    Mutant(
        "striped_diagonal_everywhere",
        "striped",
        "masks",
        "causal-off-by-one",
        "Blocks of later ranks keep their diagonal, which is one token in the future.",
        "    diagonal = 0 if source <= rank else -1\n",
        "    diagonal = 0\n",
        passes_naive=False,
    ),
    Mutant(
        "zigzag_only_next_source_is_earlier",
        "zigzag",
        "masks",
        "causal-wrong-on-some-hops",
        "Only the neighbour's block is treated as earlier; earlier ones count as later.",
        "    if source < rank:\n",
        "    if source == rank - 1:\n",
    ),
    Mutant(
        "gathering_keys_tiled",
        "gathering",
        "masks",
        "gqa-heads-interleaved",
        "Scores of query head j use key head j % g instead of j // (h / g).",
        "    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)\n",
        "    k = k.repeat(1, 1, q.shape[2] // k.shape[2], 1)\n",
    ),
    Mutant(
        "ulysses_kv_heads_tiled",
        "ulysses",
        "masks",
        "gqa-heads-interleaved",
        "Query head j attends to key/value head j % g instead of j // (h / g).",
        "        heads.append(x.to(wide).repeat_interleave(h // g, dim=2))\n",
        "        heads.append(x.to(wide).repeat(1, 1, h // g, 1))\n",
    ),
    Mutant(
        "collective_scale",
        "collective",
        "masks",
        "scale-wrong",
        "Scores are divided by d instead of its square root.",
        "q.to(compute), keys) * d**-0.5",
        "q.to(compute), keys) / d",
        passes_naive=False,
    ),
    Mutant(
        "rotating_equal_shards_for_positions",
        "rotating",
        "masks",
        "positions-by-own-length",
        "A received block is taken to begin at its rank times the length of this rank's own shard.",
        "keep = visible(where[rank], where[source], b, h, causal, window, mask_mod)",
        """theirs = where[source] - where[source][0] + source * s if hop else where[source]
                keep = visible(where[rank], theirs, b, h, causal, window, mask_mod)""",
    ),
]

COMMUNICATION = [
    Mutant(
        "rotating_one_receive_buffer",
        "rotating",
        "communication",
        "two-receives-into-one-buffer",
        "K and V are received into the same buffer.",
        "    arriving = [t.new_empty(t.shape[0], length, *t.shape[2:]) for t in tensors]\n",
        """    buffer = tensors[0].new_empty(tensors[0].shape[0], length, *tensors[0].shape[2:])
    arriving = [buffer for _ in tensors]
""",
        passes_naive=False,
    ),
    Mutant(
        "zigzag_receives_into_sent",
        "zigzag",
        "communication",
        "receive-into-buffer-being-sent",
        "The next block is received into the buffer that is being sent.",
        "    incoming = torch.empty_like(buffer)\n",
        "    incoming = buffer\n",
        racy=True,
    ),
    Mutant(
        "striped_receives_into_sent",
        "striped",
        "communication",
        "receive-into-buffer-being-sent",
        "Blocks are received into the tensors being sent, which at first are the caller's k and v.",
        "            buffer = torch.empty_like(tensor)\n",
        "            buffer = tensor\n",
        racy=True,
        passes_naive=False,
    ),
    Mutant(
        "rotating_reads_before_wait",
        "rotating",
        "communication",
        "read-before-wait",
        "The arriving K and V are copied out of their buffers before the wait.",
        """                wait(works)
                kv = arriving
        ctx.save_for_backward(""",
        """                kv = [x.clone() for x in arriving]
                wait(works)
        ctx.save_for_backward(""",
        racy=True,
        passes_naive=False,
    ),
    Mutant(
        "rotating_sends_before_wait",
        "rotating",
        "communication",
        "sent-before-wait",
        "K and V are used and sent on before they have arrived: the receives are waited for after the last hop.",
        """                wait(works)
                kv = arriving
        ctx.save_for_backward(""",
        """                kv, late = arriving, works if hop == 0 else late + works
        wait(late if size > 1 else [])
        ctx.save_for_backward(""",
        passes_naive=False,
        racy=True,
    ),
    Mutant(
        "rotating_gradient_before_wait",
        "rotating",
        "communication",
        "read-before-wait",
        "The travelling dK and dV are added to before they have arrived.",
        "                wait(home_works)\n                dk, dv = dk + home[0], dv + home[1]\n",
        "                dk, dv = dk + home[0], dv + home[1]\n                wait(home_works)\n",
        racy=True,
    ),
    Mutant(
        "zigzag_sends_not_waited",
        "zigzag",
        "communication",
        "send-never-waited",
        "The sends are never waited for; their handles are dropped, which cancels them in gloo.",
        "    return incoming, (sending, receiving)\n",
        "    return incoming, (receiving,)\n",
        hangs=True,
        racy=True,
        passes_naive=False,
    ),
    Mutant(
        "rotating_group_rank_as_global",
        "rotating",
        "communication",
        "group-rank-used-as-global",
        "Ranks of the group are passed to send and receive, which want global ranks.",
        """    following = dist.get_global_rank(group, (rank + 1) % size)
    preceding = dist.get_global_rank(group, (rank - 1) % size)
""",
        """    following = (rank + 1) % size
    preceding = (rank - 1) % size
""",
    ),
    Mutant(
        "zigzag_origin_not_global",
        "zigzag",
        "communication",
        "group-rank-used-as-global",
        "The rank to receive from is a rank of the group, but irecv wants a global one.",
        "    origin = dist.get_global_rank(group, (rank - 1) % size)\n",
        "    origin = (rank - 1) % size\n",
    ),
    Mutant(
        "collective_rank_in_world",
        "collective",
        "communication",
        "world-instead-of-group",
        "The positions of my rows come from my rank in the world instead of in the group.",
        "    rank, size = dist.get_rank(group), dist.get_world_size(group)\n",
        "    rank, size = dist.get_rank(), dist.get_world_size(group)\n",
    ),
    Mutant(
        "gathering_reduces_over_world",
        "gathering",
        "communication",
        "world-instead-of-group",
        "dK is reduced over the world, of which the group is only a part.",
        "        dist.all_reduce(dk, group=ctx.group)\n",
        "        dist.all_reduce(dk)\n",
        hangs=True,
    ),
    Mutant(
        "ulysses_pads_for_world",
        "ulysses",
        "communication",
        "world-instead-of-group",
        "Heads are padded to a multiple of the world size instead of the group's.",
        "    p = dist.get_world_size(group)\n    h, g = q.shape[2], k.shape[2]\n",
        "    p = dist.get_world_size()\n    h, g = q.shape[2], k.shape[2]\n",
    ),
    Mutant(
        "rotating_stops_hopping_when_done",
        "rotating",
        "communication",
        "unequal-hop-counts",
        "Under causal a rank stops after the blocks that it needs, while others wait for more.",
        """        kv = [k, v]
        for hop in range(size):
""",
        """        kv = [k, v]
        for hop in range(rank + 1 if causal else size):
""",
        hangs=True,
    ),
    Mutant(
        "striped_gradients_hop_once_too_often",
        "striped",
        "communication",
        "hops-once-too-often",
        "dK and dV travel p + 1 hops and end at the next rank.",
        "            if ring.size > 1 and hop < ring.size - 1:\n",
        "            if ring.size > 1:\n",
    ),
    Mutant(
        "striped_sends_to_itself",
        "striped",
        "communication",
        "self-send",
        "On one rank the last hop of the gradients is a message from the rank to itself.",
        """        if ring.size > 1:
            # the gradients are one hop short of home
            dk, dv = ring.pass_on(dk, dv)
""",
        "        dk, dv = ring.pass_on(dk, dv)\n",
    ),
    Mutant(
        "dilated_ring_sends_view",
        "dilated_ring",
        "communication",
        "non-contiguous-buffer",
        "K and V are sent as they come, which fails for views of packed qkv.",
        """        held = [k.contiguous(), v.contiguous()]
        for hop in range(size):
            source = (rank - hop) % size
            if hop""",
        """        held = [k, v]
        for hop in range(size):
            source = (rank - hop) % size
            if hop""",
    ),
    Mutant(
        "striped_wrong_direction",
        "striped",
        "communication",
        "wrong-direction",
        "Blocks are sent to the previous rank although the sources count for the next.",
        """        self.right = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self.left = dist.get_global_rank(group, (self.rank - 1) % self.size)
""",
        """        self.right = dist.get_global_rank(group, (self.rank - 1) % self.size)
        self.left = dist.get_global_rank(group, (self.rank + 1) % self.size)
""",
    ),
    Mutant(
        "dilated_ring_sends_dk_twice",
        "dilated_ring",
        "communication",
        "one-tensor-sent-twice",
        "While K and V still travel, dK is sent in the place of dV.",
        "[dk, dv, *held]\n",
        "[dk, dk, *held]\n",
    ),
    Mutant(
        "rotating_equal_shards_assumed",
        "rotating",
        "communication",
        "equal-shards-assumed",
        "A block is received into a buffer of the size of the one being sent.",
        "    arriving = [t.new_empty(t.shape[0], length, *t.shape[2:]) for t in tensors]\n",
        "    arriving = [torch.empty_like(t) for t in tensors]\n",
        hangs=True,
    ),
]

BACKWARD = [
    Mutant(
        "rotating_gradients_stay_away",
        "rotating",
        "backward",
        "gradients-not-home",
        "dK and dV make one hop too few and stay at the previous rank.",
        """            if size > 1:
                leaving = [""",
        """            home_works = []
            if hop + 1 < size:
                leaving = [""",
    ),
    Mutant(
        "gathering_keeps_own_part",
        "gathering",
        "backward",
        "gather-backward-not-reduced",
        "dK and dV are not reduced: each rank keeps what its own queries contribute.",
        """        dist.all_reduce(dk, group=ctx.group)
        dist.all_reduce(dv, group=ctx.group)
""",
        "",
    ),
    Mutant(
        "collective_gather_backward_slices",
        "collective",
        "backward",
        "gather-backward-not-reduced",
        "The backward of the all-gather takes its own slice instead of reducing over the ranks.",
        """        mine = grad.new_empty(grad.shape[1:])
        dist.reduce_scatter(mine, list(grad.contiguous()), group=ctx.group)
""",
        "        mine = grad[dist.get_rank(ctx.group)]\n",
    ),
    Mutant(
        "dilated_collective_mean_gradient",
        "dilated_collective",
        "backward",
        "gradient-averaged-over-ranks",
        "The gradients of the gathered keys are averaged over the ranks instead of summed.",
        "        dist.all_reduce(grad, group=ctx.group)\n",
        "        dist.all_reduce(grad, op=dist.ReduceOp.AVG, group=ctx.group)\n",
    ),
    Mutant(
        "ulysses_gradient_divided",
        "ulysses",
        "backward",
        "gradient-averaged-over-ranks",
        "The gradient of the all-to-all is divided by the number of ranks.",
        "        return to_tokens(grad, ctx.group), None\n",
        "        return to_tokens(grad, ctx.group) / dist.get_world_size(ctx.group), None\n",
    ),
    Mutant(
        "zigzag_block_softmax",
        "zigzag",
        "backward",
        "block-lse-instead-of-merged",
        "Backward normalises P within each block instead of with the merged lse.",
        "            prob = torch.exp(logits - lse[:, :, rows].unsqueeze(-1))\n",
        "            prob = torch.softmax(logits, dim=-1)\n",
    ),
    Mutant(
        "zigzag_block_delta",
        "zigzag",
        "backward",
        "block-out-for-delta",
        "D is the sum of P dP over the block's keys alone instead of over all keys.",
        "            dlogit = prob * (dprob - delta[:, :, rows].unsqueeze(-1))\n",
        "            dlogit = prob * (dprob - (prob * dprob).sum(-1, keepdim=True))\n",
    ),
    Mutant(
        "gathering_dlse_ignored",
        "gathering",
        "backward",
        "dlse-ignored",
        "The gradient of the returned lse is ignored.",
        "        delta = (dout * out).sum(-1).transpose(1, 2) - dlse\n",
        "        delta = (dout * out).sum(-1).transpose(1, 2)\n",
    ),
    Mutant(
        "zigzag_dlse_sign",
        "zigzag",
        "backward",
        "dlse-sign",
        "The gradient of the returned lse enters with the wrong sign.",
        "        delta = (dout * out).sum(-1) - dlse\n",
        "        delta = (dout * out).sum(-1) + dlse\n",
    ),
    Mutant(
        "ulysses_lse_detached",
        "ulysses",
        "backward",
        "dlse-ignored",
        "The returned lse is detached from the graph.",
        "lse.transpose(1, 2)[..., None]), dim=-1)",
        "lse.detach().transpose(1, 2)[..., None]), dim=-1)",
    ),
    Mutant(
        "gathering_dq_scale",
        "gathering",
        "backward",
        "scale-missing-in-dq",
        "dQ lacks the scale.",
        """            dq += torch.einsum("bhst,bthd->bshd", ds, wide_k) * ctx.scale\n""",
        """            dq += torch.einsum("bhst,bthd->bshd", ds, wide_k)\n""",
    ),
    Mutant(
        "zigzag_dk_scale",
        "zigzag",
        "backward",
        "scale-missing-in-dk",
        "dK lacks the scale.",
        "@ queries[:, :, rows] * ctx.scale\n",
        "@ queries[:, :, rows]\n",
    ),
    Mutant(
        "rotating_last_dq_only",
        "rotating",
        "backward",
        "dq-of-last-block-only",
        "dQ is overwritten at every hop instead of accumulated.",
        "                dq = dq + block_dq\n",
        "                dq = block_dq\n",
    ),
    Mutant(
        "rotating_own_gradient_only",
        "rotating",
        "backward",
        "gradients-of-own-block-only",
        "What travelled with a block is thrown away: only its last visitor's dK and dV come home.",
        "                dk, dv = dk + home[0], dv + home[1]\n",
        "",
    ),
    Mutant(
        "rotating_saves_last_block",
        "rotating",
        "backward",
        "saved-block-is-a-neighbours",
        "The K and V saved for backward are those that arrived last, not the rank's own.",
        "        ctx.save_for_backward(q, k, v, out, lse)\n",
        "        ctx.save_for_backward(q, *kv, out, lse)\n",
    ),
    Mutant(
        "zigzag_dv_block_softmax",
        "zigzag",
        "backward",
        "dv-uses-wrong-p",
        "dV uses the block's own softmax; dQ and dK use the merged one.",
        "            dvalue = prob.transpose(-1, -2) @ dout[:, :, rows]\n",
        "            dvalue = torch.softmax(logits, -1).transpose(-1, -2) @ dout[:, :, rows]\n",
    ),
    Mutant(
        "zigzag_kv_heads_averaged",
        "zigzag",
        "backward",
        "gqa-gradient-averaged",
        "dK and dV are averaged over the query heads of a group instead of summed.",
        "    return x.reshape(b, kv_heads, h // kv_heads, s, d).sum(2).transpose(1, 2)\n",
        "    return x.reshape(b, kv_heads, h // kv_heads, s, d).mean(2).transpose(1, 2)\n",
    ),
    Mutant(
        "striped_first_head_of_group",
        "striped",
        "backward",
        "gqa-gradient-of-one-head",
        "dV counts only the first query head of each group.",
        "            dv = dv + wide_dv.view(b, s, g, repeat, d).sum(3)\n",
        "            dv = dv + wide_dv.view(b, s, g, repeat, d)[:, :, :, 0]\n",
    ),
    Mutant(
        "striped_state_on_class",
        "striped",
        "backward",
        "saved-state-shared-between-calls",
        "What backward needs is kept on the class, so a later forward overwrites it.",
        """        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.ring, ctx.scale = causal, ring, scale
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
""",
        """        StripedRing.saved = q, k, v, out, lse
        ctx.causal, ctx.ring, ctx.scale = causal, ring, scale
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = StripedRing.saved
""",
    ),
    Mutant(
        "zigzag_stale_gradients",
        "zigzag",
        "backward",
        "stale-gradients",
        "The buffer of the travelling gradients is kept between steps and never cleared.",
        "        travelling = torch.zeros(kv.shape, dtype=wide, device=kv.device)\n",
        """        travelling = getattr(ZigzagRing, "buffer", None)
        if travelling is None or travelling.shape != kv.shape or travelling.dtype != wide:
            travelling = torch.zeros(kv.shape, dtype=wide, device=kv.device)
            ZigzagRing.buffer = travelling
""",
    ),
    Mutant(
        "gathering_backward_of_blind_row",
        "gathering",
        "backward",
        "nan-gradient-when-nothing-seen",
        "The backward of a row that sees nothing computes exp(-inf + inf), which is NaN.",
        "        lse = torch.where(lse == -math.inf, math.inf, lse)\n",
        "",
    ),
    Mutant(
        "striped_dk_dv_swapped",
        "striped",
        "backward",
        "dk-dv-swapped",
        "dK and dV are exchanged on their last hop.",
        "            # the gradients are one hop short of home\n            dk, dv = ring",
        "            # the gradients are one hop short of home\n            dv, dk = ring",
    ),
    Mutant(
        "striped_backward_mask",
        "striped",
        "backward",
        "backward-mask-differs",
        "Backward masks every block as if it were the rank's own.",
        "            keep = stripe_mask(s, ring.rank, source, ctx.causal, q.device)\n",
        "            keep = stripe_mask(s, ring.rank, ring.rank, ctx.causal, q.device)\n",
    ),
    Mutant(
        "striped_query_scaled_in_place",
        "striped",
        "backward",
        "input-written-in-place",
        "q is multiplied by the scale in place, in the caller's tensor unless the dtype changes.",
        """        scale = d**-0.5
        dtype = torch.double if q.dtype == torch.double else torch.float
        query = q.to(dtype)
""",
        """        dtype = torch.double if q.dtype == torch.double else torch.float
        query = q.to(dtype)
        query *= d**-0.5
        scale = 1.0
""",
    ),
]

DILATION = [
    Mutant(
        "dilated_ring_offset_from_shard",
        "dilated_ring",
        "dilation",
        "offset-from-shard",
        "The offsets of kept rows are counted from the start of the shard, not of the segment.",
        """        kept_rows = (rows % w) % r == offset
        kept_cols = (cols % w) % r == offset
""",
        """        kept_rows = ((rows - rows[0]) % w) % r == offset
        kept_cols = ((cols - cols[0]) % w) % r == offset
""",
    ),
    Mutant(
        "dilated_collective_offset_from_start",
        "dilated_collective",
        "dilation",
        "offset-from-sequence-start",
        "Kept rows are counted from the start of the sequence, not of the segment.",
        """        row_kept = (rows % w % r)[None, :] == offset[:, None]
        col_kept = (cols % w % r)[None, :] == offset[:, None]
""",
        """        row_kept = (rows % r)[None, :] == offset[:, None]
        col_kept = (cols % r)[None, :] == offset[:, None]
""",
    ),
    Mutant(
        "dilated_collective_segment_from_shard",
        "dilated_collective",
        "dilation",
        "segment-from-shard",
        "The segments of the queries are counted from the start of the shard.",
        "        together = (rows // w)[:, None] == (cols // w)[None, :]\n",
        "        together = ((rows - rows[0]) // w)[:, None] == (cols // w)[None, :]\n",
        passes_naive=False,
    ),
    Mutant(
        "dilated_local_heads_left_out",
        "dilated_local",
        "dilation",
        "heads-unassigned",
        "When the rate does not divide the heads, the last heads are left out of the branch.",
        "list(range(offset, heads, r))) for offset",
        "list(range(offset, heads - heads % r, r))) for offset",
    ),
    Mutant(
        "dilated_local_tail_dropped",
        "dilated_local",
        "dilation",
        "tail-dropped",
        "The tail that does not fill a segment is dropped.",
        "        for start in range(0, n, w):\n",
        "        for start in range(0, n - n % w if n > w else n, w):\n",
    ),
    Mutant(
        "dilated_collective_long_segment_skipped",
        "dilated_collective",
        "dilation",
        "long-segment-skipped",
        "A branch whose segment is longer than the sequence is skipped, not taken as one segment.",
        "        offset, served = head % r, torch.ones_like(head, dtype=torch.bool)\n",
        """        if w > len(cols):
            continue
        offset, served = head % r, torch.ones_like(head, dtype=torch.bool)
""",
    ),
    Mutant(
        "dilated_local_zero_lse",
        "dilated_local",
        "dilation",
        "zero-lse-for-unselected-rows",
        "Rows that a branch does not select have lse 0 instead of -inf and take weight.",
        "lse = torch.full((b, n, h), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device)",
        "lse = torch.zeros((b, n, h), dtype=q.dtype, device=q.device)",
        passes_naive=False,
    ),
    Mutant(
        "dilated_local_branches_averaged",
        "dilated_local",
        "dilation",
        "branches-averaged",
        "The branches are averaged instead of weighted by their softmax denominators.",
        "    weight = torch.softmax(lses, dim=0).unsqueeze(-1)\n",
        "    weight = torch.full_like(lses, 1 / len(branches)).unsqueeze(-1)\n",
        passes_naive=False,
    ),
    Mutant(
        "dilated_local_weights_detached",
        "dilated_local",
        "dilation",
        "mixing-weights-detached",
        "The mixing weights of the branches are detached from the graph.",
        "    weight = torch.softmax(lses, dim=0).unsqueeze(-1)\n",
        "    weight = torch.softmax(lses.detach(), dim=0).unsqueeze(-1)\n",
    ),
    Mutant(
        "dilated_local_lse_of_last_branch",
        "dilated_local",
        "dilation",
        "lse-of-one-branch",
        "The returned lse is that of the last branch.",
        "    lse = torch.logsumexp(lses, dim=0).masked_fill",
        "    lse = lses[-1].masked_fill",
    ),
    Mutant(
        "dilated_local_kv_heads_interleaved",
        "dilated_local",
        "dilation",
        "gqa-heads-interleaved",
        "Query head j attends to key/value head j % g instead of j // (h / g).",
        "        kv_heads = [j // (h // k.shape[2]) for j in heads]\n",
        "        kv_heads = [j % k.shape[2] for j in heads]\n",
    ),
    Mutant(
        "dilated_local_attends_over_heads",
        "dilated_local",
        "dilation",
        "attends-over-heads",
        "The kernel wants b h s d but is given b s h d, so each token attends over the heads.",
        """    return torch.einsum("bhij,bjhd->bihd", weight, v), lse
""",
        """    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out, lse
""",
        passes_naive=False,
    ),
    Mutant(
        "dilated_ring_offset_divides",
        "dilated_ring",
        "dilation",
        "offset-j-div-r",
        "The offset of head j is (j // r) % r instead of j % r.",
        "        return j % r\n",
        "        return j // r % r\n",
        passes_naive=False,
    ),
    Mutant(
        "dilated_collective_future_leak",
        "dilated_collective",
        "dilation",
        "causal-leak",
        "The causal mask compares shards instead of positions, so a shard sees its own future.",
        "        count = count * (cols[None, :] <= rows[:, None])\n",
        "        count = count * (cols[None, :] // s <= rows[:, None] // s)\n",
        passes_naive=False,
    ),
    Mutant(
        "dilated_collective_keys_counted_once",
        "dilated_collective",
        "dilation",
        "multiplicity-ignored",
        "A key that several branches show counts once.",
        "        count += kept & served[:, None, None]\n",
        "        count = torch.maximum(count, (kept & served[:, None, None]).float())\n",
        passes_naive=False,
    ),
    Mutant(
        "dilated_ring_first_branch_backward",
        "dilated_ring",
        "dilation",
        "backward-of-first-branch-only",
        "Backward walks only the first branch.",
        """            for keep in masks:
                logits = """,
        """            for keep in masks[:1]:
                logits = """,
    ),
    Mutant(
        "dilated_ring_branch_softmax_backward",
        "dilated_ring",
        "dilation",
        "branch-lse-instead-of-merged",
        "Backward normalises P within each branch and block instead of with the merged lse.",
        "p = torch.exp(logits.masked_fill(~keep, NEVER) - lse[..., None])",
        "p = torch.softmax(logits.masked_fill(~keep, NEVER), dim=-1).nan_to_num()",
    ),
    Mutant(
        "dilated_ring_wrong_source_backward",
        "dilated_ring",
        "dilation",
        "wrong-source-rank",
        "In backward hop t is taken to bring the block of rank + t, but it brings rank - t's.",
        """            source = (rank - hop) % size
            keys, values = """,
        """            source = (rank + hop) % size
            keys, values = """,
    ),
]

ULYSSES = [
    Mutant(
        "ulysses_head_order",
        "ulysses",
        "ulysses",
        "head-order",
        "After the second all-to-all the heads of the ranks are interleaved instead of joined.",
        "    return exchange(blocks, group).permute(1, 2, 0, 3, 4).reshape(",
        "    return exchange(blocks, group).permute(1, 2, 3, 0, 4).reshape(",
        passes_naive=False,
    ),
    Mutant(
        "ulysses_sequence_order",
        "ulysses",
        "ulysses",
        "sequence-order",
        "After the first all-to-all the tokens of the ranks are interleaved instead of joined.",
        "    return exchange(blocks, group).transpose(0, 1).reshape(",
        "    return exchange(blocks, group).permute(1, 2, 0, 3, 4).reshape(",
        passes_naive=False,
    ),
    Mutant(
        "ulysses_batch_mixed_in_gather",
        "ulysses",
        "ulysses",
        "batch-mixed",
        "The all-to-all's rank axis is merged over the batch axis, right for one sequence only.",
        "    return exchange(blocks, group).transpose(0, 1).reshape(",
        "    return exchange(blocks, group).reshape(",
    ),
    Mutant(
        "ulysses_batch_mixed_in_scatter",
        "ulysses",
        "ulysses",
        "batch-mixed",
        "Tokens are cut into ranks before the batch axis, right for one sequence only.",
        "    blocks = x.reshape(b, p, n // p, h, d).transpose(0, 1)\n",
        "    blocks = x.reshape(p, b, n // p, h, d)\n",
    ),
    Mutant(
        "ulysses_pads_in_front",
        "ulysses",
        "ulysses",
        "padded-heads-kept",
        "Zero heads are added in front but dropped at the end.",
        "F.pad(x, (0, 0, 0, padding))",
        "F.pad(x, (0, 0, padding, 0))",
    ),
    Mutant(
        "ulysses_padding_formula",
        "ulysses",
        "ulysses",
        "heads-not-divisible",
        "Heads are padded by h % p instead of up to the next multiple of p.",
        "    padding = -h % p\n",
        "    padding = h % p\n",
    ),
]

TILES = [
    Mutant(
        "tiled_mask_from_tile",
        "tiled",
        "tiles",
        "mask-from-tile",
        "The causal mask of a tile counts from the tile, not from the block: right until a second tile.",
        "s.masked_fill(~triangle(b - a, e - c, shift), -math.inf)\n            new = ",
        "s.masked_fill(~triangle(b - a, e - c, first_row - first_col), -math.inf)\n            new = ",
    ),
    Mutant(
        "tiled_mask_kept_by_shape",
        "tiled",
        "tiles",
        "mask-kept-by-shape",
        "Masks are kept between calls by their shape alone, so that of another call or hop is used.",
        "def triangle(rows, cols, shift):\n",
        """def triangle(rows, cols, shift, first={}):
    shift = first.setdefault((rows, cols), shift)
""",
        passes_naive=False,
    ),
    Mutant(
        "tiled_scale_kept_by_heads",
        "tiled",
        "tiles",
        "state-under-too-small-a-key",
        "The scale of the first call is kept for every later call with as many heads, whatever the head dim.",
        "        scale = d**-0.5 if scale is None else scale\n",
        "        scale = vars(triangle).setdefault(h, d**-0.5) if scale is None else scale\n",
        racy=True,
    ),
    Mutant(
        "tiled_scale_of_padded_dim",
        "tiled",
        "tiles",
        "scale-of-padded-dim",
        "The scale is taken after the head dim was padded to a multiple of 8.",
        "        scale = d**-0.5 if scale is None else scale\n",
        "        scale = (d + -d % 8) ** -0.5 if scale is None else scale\n",
    ),
    Mutant(
        "tiled_scale_ignored",
        "tiled",
        "tiles",
        "scale-ignored",
        "The argument `scale` is ignored.",
        "        scale = d**-0.5 if scale is None else scale\n",
        "        scale = d**-0.5\n",
    ),
    Mutant(
        "tiled_workspace_not_cleared",
        "tiled",
        "tiles",
        "unwritten-memory",
        "The running output starts as memory that nobody has written.",
        "        out.zero_()\n",
        "",
        racy=True,
    ),
    Mutant(
        "tiled_dout_strides",
        "tiled",
        "tiles",
        "dout-strides",
        "dO is read as if it were contiguous, which a transposed view is not.",
        "        do = do.to(wide)\n",
        "        do = do.to(wide).as_strided(do.shape, torch.empty(do.shape, device='meta').stride())\n",
    ),
    Mutant(
        "tiled_dq_in_input_dtype",
        "tiled",
        "tiles",
        "accumulates-in-bf16",
        "The running dQ is kept in the input dtype (bf16).",
        "        dq = torch.zeros_like(queries)\n",
        "        dq = torch.zeros_like(queries, dtype=q.dtype)\n",
    ),
    Mutant(
        "tiled_dk_travels_in_input_dtype",
        "tiled",
        "tiles",
        "accumulates-in-bf16",
        "The dK and dV that travel are rounded to the input dtype (bf16) at every hop.",
        "                homeward = [hop.post(dk), hop.post(dv)]\n",
        "                homeward = [hop.post(dk.to(q.dtype)), hop.post(dv.to(q.dtype))]\n",
    ),
    Mutant(
        "tiled_stale_values_backward",
        "tiled",
        "tiles",
        "stale-v-in-backward",
        "In the backward V is never replaced by the one that arrived: every hop uses the rank's own.",
        "                keys, values = next_keys, next_values\n        if homeward:\n",
        "                keys = next_keys\n        if homeward:\n",
    ),
    Mutant(
        "tiled_maximum_not_stored",
        "tiled",
        "tiles",
        "only-the-last-tile",
        "The new maximum is not stored, so what was summed before a tile is scaled by exp(-inf) = 0.",
        "            top[:, :, a:b] = new\n",
        "",
        passes_naive=False,
    ),
]

SERVING = [
    Mutant(
        "serving_kv_positions_ignored",
        "serving",
        "serving",
        "positions-of-queries-for-keys",
        "The positions of the queries are taken for those of the keys.",
        "places(rows if kv_positions is None else kv_positions.to(device), group, device)",
        "places(rows if kv_positions is None else rows[0] + torch.arange(k.shape[1]), group, device)",
    ),
    Mutant(
        "serving_causal_bottom_right",
        "serving",
        "serving",
        "causal-bottom-right",
        "The causal mask is aligned bottom-right: the last query of every rank sees every key.",
        "        keep &= j <= i\n",
        "        keep &= j - len(cols) <= torch.arange(len(rows), device=rows.device)[:, None] - len(rows)\n",
        passes_naive=False,
    ),
    Mutant(
        "serving_document_starts_late",
        "serving",
        "serving",
        "documents-off-by-one",
        "The first token of a document counts to the document before it.",
        "torch.bucketize(i, ends, right=True) == torch.bucketize(j, ends, right=True)",
        "torch.bucketize(i, ends) == torch.bucketize(j, ends)",
    ),
    Mutant(
        "serving_sink_of_every_rank",
        "serving",
        "serving",
        "sink-counted-p-times",
        "The sink joins the softmax once for every rank.",
        "expand(len(q), heads, len(rows), 1)",
        "expand(len(q), heads, len(rows), dist.get_world_size(group))",
    ),
    Mutant(
        "serving_sink_scaled",
        "serving",
        "serving",
        "sink-scaled",
        "The sink's logit is multiplied by the scale as if it were a product of q and k.",
        "        column = sink.to(wide).view(1, -1, 1, 1)",
        "        column = scale * sink.to(wide).view(1, -1, 1, 1)",
    ),
    Mutant(
        "serving_score_mod_local",
        "serving",
        "serving",
        "score-mod-local-indices",
        "score_mod is given the index of a query within its shard, not its global position.",
        "head, rows.view(1, 1, -1, 1), cols.view(1, 1, 1, -1))",
        "head, torch.arange(len(rows), device=device).view(1, 1, -1, 1), cols.view(1, 1, 1, -1))",
    ),
    Mutant(
        "serving_score_mod_not_differentiated",
        "serving",
        "serving",
        "score-mod-not-differentiated",
        "The gradient passes score_mod as if it were the identity.",
        "        scores = score_mod(scores, batch, head, rows.view(1, 1, -1, 1), cols.view(1, 1, 1, -1))\n",
        """        new = score_mod(scores, batch, head, rows.view(1, 1, -1, 1), cols.view(1, 1, 1, -1))
        scores = scores + (new - scores).detach()
""",
    ),
    Mutant(
        "serving_out_of_another_dtype",
        "serving",
        "serving",
        "out-of-another-dtype",
        "The output stays float32 whatever the dtype of the inputs.",
        "    return out.to(q.dtype), ",
        "    return out, ",
    ),
    Mutant(
        "serving_scale_ignored",
        "serving",
        "serving",
        "scale-ignored",
        "The argument `scale` is ignored.",
        "    scale = q.shape[-1] ** -0.5 if scale is None else scale\n",
        "    scale = q.shape[-1] ** -0.5\n",
    ),
]

TREE = [
    Mutant(
        "tree_local_maximum",
        "tree",
        "tree",
        "local-maximum",
        "Every rank shifts by its own maximum, so the sums of the ranks are on different scales.",
        "        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)\n",
        "",
        passes_naive=False,
    ),
    Mutant(
        "tree_dq_not_reduced",
        "tree",
        "tree",
        "dq-not-reduced",
        "dQ is not summed over the ranks: only the own keys count in it.",
        "        dist.all_reduce(dq, group=ctx.group)\n",
        "",
    ),
    Mutant(
        "tree_kv_positions_ignored",
        "tree",
        "tree",
        "positions-of-queries-for-keys",
        "The keys are taken to lie where a contiguous cut of the queries would put them.",
        "positions if kv_positions is None else kv_positions, causal",
        "positions[:1] + torch.arange(k.shape[1]), causal",
    ),
    Mutant(
        "tree_epsilon",
        "tree",
        "tree",
        "epsilon-in-the-sum",
        "1e-4 is added to the denominator.",
        "        out = out / total.transpose(1, 2)[..., None]\n",
        "        out = out / (total.transpose(1, 2)[..., None] + 1e-4)\n",
    ),
    Mutant(
        "tree_finite_mask",
        "tree",
        "tree",
        "finite-mask-value",
        "A masked score is -1e4, which real scores can be below.",
        "LOW = -1e30\n",
        "LOW = -1e4\n",
    ),
]

SOME_BLOCKS = [
    Mutant(
        "rotating_own_values_everywhere",
        "rotating",
        "some blocks",
        "own-v-at-every-hop",
        "V is not replaced by the one that arrived: the rank's own V is joined with every block's K.",
        "                kv = arriving\n        ctx.save_for_backward",
        "                kv = [arriving[0], v]\n        ctx.save_for_backward",
        passes_naive=False,
    ),
    Mutant(
        "rotating_scale_of_received",
        "rotating",
        "some blocks",
        "scale-wrong-on-received-blocks",
        "The scores of received blocks are scaled by ln 2 once more.",
        "kv[0].to(acc), kv[1].to(acc), keep, scale)\n                out, lse",
        "kv[0].to(acc), kv[1].to(acc), keep, 0.6931471805599453 ** (hop > 0) * scale)\n                out, lse",
        passes_naive=False,
    ),
    Mutant(
        "rotating_base_two_lse_received_backward",
        "rotating",
        "some blocks",
        "base-2-lse-on-received-blocks",
        "In the backward the lse is multiplied by log2 e for the blocks that were received.",
        "dout, delta, lse, keep, ctx.scale\n",
        "dout, delta, lse if hop == 0 else lse * 1.4426950408889634, keep, ctx.scale\n",
    ),
    Mutant(
        "rotating_row_sum_of_own_block_only",
        "rotating",
        "some blocks",
        "row-sum-missing-on-received-blocks",
        "The row sum D is subtracted for the own block only; for received ones it is 0.",
        "dout, delta, lse, keep, ctx.scale\n",
        "dout, delta if hop == 0 else 0 * delta, lse, keep, ctx.scale\n",
    ),
    Mutant(
        "rotating_stale_keys_last_hop",
        "rotating",
        "some blocks",
        "stale-k-on-last-hop",
        "At the last hop of the backward K is still that of the hop before.",
        "                kv = arriving\n        if size > 1:\n            wait(home_works)",
        "                kv = arriving if hop + 2 < size else [kv[0], arriving[1]]\n"
        "        if size > 1:\n            wait(home_works)",
    ),
    Mutant(
        "zigzag_ranks_reversed_backward",
        "zigzag",
        "some blocks",
        "ranks-reversed",
        "In the backward earlier and later ranks are exchanged: ranks count from the end.",
        "            rows, cols, triangle = visit(rank, source, s, ctx.causal)\n",
        "            rows, cols, triangle = visit(size - 1 - rank, size - 1 - source, s, ctx.causal)\n",
    ),
    Mutant(
        "dilated_local_zero_lse_is_unselected",
        "dilated_local",
        "some blocks",
        "zero-lse-taken-for-masked",
        "A row whose lse is exactly 0 in a branch is taken for one that the branch did not select.",
        "    lses = torch.stack([lse for _, lse in branches])\n",
        "    lses = torch.stack([lse.masked_fill(lse == 0, torch.finfo(wide).min) for _, lse in branches])\n",
    ),
]

BLIND = [  # kinds that the oracle could not name when a reader who had not seen its rules wrote them
    Mutant(
        "packet_sink_missing_in_saved",
        "packet",
        "sinks",
        "sink-missing-in-saved",
        "The backward gets the out and lse from before the sink was added.",
        """            with_sink = torch.logaddexp(lse, sink.to(wide).view(1, g, h // g, 1))
            out, lse = out * torch.exp(lse - with_sink)[..., None], with_sink
        ctx.save_for_backward(q, k, v, sink, out, lse)
""",
        """            with_sink = torch.logaddexp(lse, sink.to(wide).view(1, g, h // g, 1))
            ctx.save_for_backward(q, k, v, sink, out, lse)
            out, lse = out * torch.exp(lse - with_sink)[..., None], with_sink
        else:
            ctx.save_for_backward(q, k, v, sink, out, lse)
""",
    ),
    Mutant(
        "packet_dsink_of_one_sequence",
        "packet",
        "sinks",
        "dsink-of-batch-0",
        "The sink's gradient is that of the first sequence of the batch.",
        "(share * delta).sum((0, 3))",
        "(share * delta)[0].sum(-1)",
    ),
    Mutant(
        "packet_scale_of_value_dim",
        "packet",
        "scores",
        "scale-of-value-dim",
        "The default scale is taken from the head dim of v.",
        "scale = d**-0.5 if scale is None else scale",
        "scale = e**-0.5 if scale is None else scale",
    ),
    Mutant(
        "packet_delta_of_unnormalised_out",
        "packet",
        "backward",
        "delta-of-unnormalised-out",
        "D is taken from the output before it is divided by the sum.",
        "ctx.save_for_backward(q, k, v, sink, out, lse)",
        "ctx.save_for_backward(q, k, v, sink, acc, lse)",
    ),
    Mutant(
        "packet_dlse_on_own_block_only",
        "packet",
        "some blocks",
        "dlse-on-own-block-only",
        "The gradient of lse is used at hop 0 only.",
        "dscore = prob * (dprob - delta[..., None]) * scale",
        "dscore = prob * (dprob - (delta if hop == 0 else (dout * out).sum(-1))[..., None]) * scale",
    ),
    Mutant(
        "packet_sum_in_low_precision",
        "packet",
        "merging",
        "sum-in-low-precision",
        "The running sum is kept in the dtype of the inputs.",
        "total = total * fade + weight.sum(-1)",
        "total = (total * fade + weight.sum(-1)).to(q.dtype).to(wide)",
    ),
    Mutant(
        "packet_rescaled_upside_down",
        "packet",
        "merging",
        "rescaled-upside-down",
        "What runs is multiplied by exp(new − old maximum) instead of exp(old − new).",
        "fade = torch.exp(top - shift)",
        "fade = torch.exp(shift - top).nan_to_num(0.0, 0.0, 0.0)",
        passes_naive=False,
    ),
    Mutant(
        "halves_dk_in_the_other_half",
        "halves",
        "some blocks",
        "dk-in-the-other-half",
        "dk of the first half of an earlier rank's keys is added to the second half.",
        "dk[:, :half] += new_k",
        "dk[:, half:] += new_k",
    ),
    Mutant(
        "halves_late_half_sees_early_keys_only",
        "halves",
        "some blocks",
        "late-half-sees-early-keys-only",
        "Of a later rank's block the late half of the queries sees the first half of the keys only.",
        "*kernel(q[:, half:], k, v, False))",
        "*kernel(q[:, half:], k[:, :half], v[:, :half], False))",
        passes_naive=False,
    ),
]

MUTANTS = [
    *(*MERGING, *MASKS, *COMMUNICATION, *BACKWARD, *DILATION, *ULYSSES),
    *(*TILES, *SERVING, *TREE, *SOME_BLOCKS, *BLIND),
]
