"""Bugs in rows of documents: packing, attention, and the parts that context parallelism cuts. The
same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

DOCUMENTS = "megalora/model/documents.py"
ATTENTION = "megalora/model/attention.py"
PACK = "megalora/data/pack.py"
BATCH = "megalora/data/batch.py"
INPUTS = "megalora/train/inputs.py"
BATCHES = "megalora/train/batches.py"
OF_DOCUMENTS = "tests/model/test_documents.py"
OF_PACKING = "tests/data/test_pack.py"
OF_INPUTS = "tests/train/test_inputs.py"
OF_BATCHES = "tests/train/test_batches.py"
CUT = "tests/distributed/test_context_parallel.py"

# fmt: off
ROW_BUGS: tuple[Bug, ...] = (
    bug(0, "documents of a chunk see each other", DOCUMENTS,
        "inside = [end for end in ends if start < end < stop]", "inside = []",
        f"{OF_DOCUMENTS} masked_row"),
    bug(0, "a chunk sees the document before its own", DOCUMENTS,
        "first_key = max(end for end in ends if end <= start)", "first_key = 0",
        f"{OF_DOCUMENTS} masked_row"),
    bug(0, "positions counted along the row", DOCUMENTS,
        "np.arange(ends[-1]) - starts", "np.arange(ends[-1]) - 0 * starts",
        f"{OF_DOCUMENTS} start_anew"),
    bug(0, "keys in the order of ranks", DOCUMENTS,
        "parts[:, 1].flip(0)", "parts[:, 1]", f"{OF_DOCUMENTS} parts_of_a_row"),
    bug(0, "a late chunk causal from its first key", ATTENTION,
        "mask = causal_lower_right(num_queries, num_keys)", "pass",
        f"{OF_DOCUMENTS} masked_row"),
    bug(0, "flash attention told the queries' longest piece", DOCUMENTS,
        "for start, end in pairwise(self.key_ends)", "for start, end in pairwise(self.query_ends)",
        f"{OF_DOCUMENTS} longest_pieces"),
    bug(0, "keys and values of this rank alone", ATTENTION,
        "return unzigzag(gather_seq(local, self.cp), self.cp.size())",
        "return unzigzag(local.repeat(self.cp.size(), 1, 1), self.cp.size())",
        f"{CUT} one_gradient"),
    bug(0, "losses summed without the parts of a row", "megalora/parallel.py",
        "get_data_parallel_group(with_context_parallel=True)", "get_data_parallel_group()",
        f"{CUT} one_gradient"),
    bug(0, "labels not cut as tokens are", INPUTS,
        "labels = own(batch.labels)", "labels = batch.labels[: len(pieces[0])]",
        f"{OF_INPUTS} parts_of_a_row"),
    bug(0, "a loss over filler", BATCH,
        "loss_mask = torch.zeros(length, dtype=torch.float32)",
        "loss_mask = torch.ones(length, dtype=torch.float32)", "tests/data/test_batch.py shifted"),
    bug(0, "filler in the last document", BATCH,
        "ends.append(min(ends[-1] + FILLER, length))", "ends[-1] = min(ends[-1] + FILLER, length)",
        "tests/data/test_batch.py shifted"),
    bug(0, "filler in one long document", BATCH,
        "ends.append(min(ends[-1] + FILLER, length))", "ends.append(length)",
        "tests/data/test_batch.py short_documents"),
    bug(0, "filler of one token", BATCH,
        "np.resize(filler, num_filler)", "np.resize(filler[:1], length - ends[-1])",
        "tests/data/test_batch.py short_documents"),
    bug(0, "filler of interleaved rows not counted", BATCHES,
        "padded=self.config.parallel.vpp > 1", "padded=False", f"{OF_BATCHES} what_runs"),
    bug(0, "stages pack by cost alone", BATCHES,
        "one_length=p.pp > 1", "one_length=False", f"{OF_BATCHES} as_the_planner_says"),
    bug(0, "the planner packs by cost alone", "megalora/planner/packing.py",
        "dp, multiple, one_length=one_length)", "dp, multiple)",
        f"{OF_BATCHES} as_the_planner_says"),
    bug(0, "a pipeline's longest row left as it is", PACK,
        "room = min(capacity, int(mean_tokens * (1 + share)))", "room = capacity",
        f"{OF_PACKING} is_lowered"),
    bug(0, "shorter rows at any price", PACK,
        "rows = min(rows, both, key=_longest_time)", "rows = both", f"{OF_PACKING} costs_no_time"),
    bug(0, "rows one token too long", PACK,
        "bisect.bisect_left(free, (length, -1))", "bisect.bisect_left(free, (length - 1, -1))",
        f"{OF_PACKING} last_token"),
    bug(0, "ranks with rounds of their own", PACK,
        "math.ceil(rounds / multiple) * multiple * num_ranks", "rounds * num_ranks",
        f"{OF_PACKING} overflows"),
    bug(0, "every row asked for room", PACK,
        "last = min(place + PLACES, num_rows)", "last = num_rows", f"{OF_PACKING} long_evaluation"),
    bug(0, "rows not sorted by cost", PACK,
        "    rows.sort(key=lambda row: (-row.cost, row.samples[:1]))\n", "",
        f"{OF_PACKING} falling_order"),
)
# fmt: on
