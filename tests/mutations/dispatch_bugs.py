"""Bugs in sending each token once to every rank that has experts of it. The same form as
``bugs.py``."""

from tests.mutations.bugs import Bug, bug

DISPATCHER = "megalora/model/dispatcher.py"
DESTINATIONS = "kernels/megalora_kernels/destinations.py"
REGROUP = "kernels/megalora_kernels/regroup.py"
COMBINE = "kernels/megalora_kernels/combine.py"
MICROBATCH = "megalora/planner/microbatch.py"
DISPATCH_TEST = "tests/distributed/test_dispatch.py"
ROUTE_TEST = "tests/kernels/test_route.py"

# fmt: off
DISPATCH_BUGS: tuple[Bug, ...] = (
    bug(0, "the first row counted once more for every empty slot", REGROUP,
        "slots = torch.full((arrivals.num_rows * num_slots,), -1",
        "slots = torch.full((arrivals.num_rows * num_slots,), 0", f"{DISPATCH_TEST} plain_layer"),
    bug(0, "as many rows expected back as there are pairs", DISPATCHER,
        "self._splits(mine[-R:], rows)", "self._splits(mine[:-R].view(R, -1).sum(1), rows)",
        f"{DISPATCH_TEST} plain_layer"),
    bug(0, "every token sent to every rank", DESTINATIONS,
        "(num_ranks, per_rank)).any(2)",
        "(num_ranks, per_rank)).any(2) | (top_k >= num_ranks)", f"{DISPATCH_TEST} travels_once"),
    bug(0, "weights of another rank's experts", DISPATCHER,
        "first = self.ep_rank * self.num_local_experts",
        "first = (self.ep_size - 1 - self.ep_rank) * self.num_local_experts",
        f"{DISPATCH_TEST} plain_layer"),
    bug(0, "received rows found in the order of the ranks reversed", REGROUP,
        "first_row_M = _exclusive(arrivals.rows_R)",
        "first_row_M = _exclusive(arrivals.rows_R.flip(0)).flip(0)",
        f"{DISPATCH_TEST} plain_layer"),
    bug(0, "rows of a rank found from the first rank's on", REGROUP,
        "tl.where(of_rank < rank, rows, 0)", "tl.where(of_rank < 0, rows, 0)",
        f"{ROUTE_TEST} test_regroup"),
    bug(0, "an empty slot read as the first row", COMBINE,
        "masked_fill_(slot_T[:, None] < 0, 0)", "masked_fill_(slot_T[:, None] < -1, 0)",
        "tests/kernels/test_combine.py empty_slots"),
    bug(0, "an empty slot read by the kernel", COMBINE,
        "(cols < H) & (row >= 0)", "(cols < H) & (row >= -1)",
        "tests/kernels/test_combine.py empty_slots"),
    bug(0, "all of a token's experts in the first slot", DESTINATIONS,
        "tl.where(is_new, 0, nth_expert + 1)", "tl.where(is_new, 0, nth_expert)",
        f"{ROUTE_TEST} sent_once"),
    bug(0, "a pair's row among those of all ranks", DESTINATIONS,
        "(row - first_row) * num_slots", "row * num_slots", f"{ROUTE_TEST} sent_once"),
    bug(0, "results sent back as they were sent out", DISPATCHER,
        "self.rows.sent, self.rows.received)", "self.rows.received, self.rows.sent)",
        f"{DISPATCH_TEST} plain_layer"),
    bug(0, "rows of expert tensor parallelism gathered as pairs are", DISPATCHER,
        "hidden_states, output_split_sizes=self.rows.over_tp",
        "hidden_states, output_split_sizes=self.pairs.over_tp", f"{DISPATCH_TEST} plain_layer"),
    bug(0, "a probability rounded on the way", DISPATCHER,
        "torch.promote_types(values_M.dtype, torch.float32)", "torch.float32",
        f"{DISPATCH_TEST} plain_layer"),
    bug(0, "a plan in which every choice is another rank", MICROBATCH,
        "return ep * (1 - missed)", "return float(min(ep, top_k))",
        "tests/planner/test_memory.py ranks_of_a_token"),
)
# fmt: on
