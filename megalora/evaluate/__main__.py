"""``torchrun --nproc-per-node N -m megalora.evaluate REQUEST``: what ``megalora eval`` starts."""

import sys
from pathlib import Path

from megalora.user_error import guarded


def main(arguments: list[str]) -> None:
    from megalora.evaluate.request import Request, plan_of

    if len(arguments) != 1:
        raise ValueError("usage: megalora eval ADAPTER --data FILE; see megalora eval --help")
    request = Request.from_json(arguments[0])
    plan = plan_of(request)
    from megalora import host

    # Before anything imports Megatron.
    host.install()
    import torch.distributed as dist

    from megalora.evaluate.judge import judge
    from megalora.evaluate.report import text_of, write_record

    with host.process_group(plan.config.train.timeout_minutes):
        verdict = judge(plan)
        if dist.get_rank() == 0:
            print(text_of(plan, verdict), flush=True)
            if request.out is not None:
                write_record(plan, verdict, Path(request.out))
                print(f"wrote {request.out}")


if __name__ == "__main__":
    guarded(main, sys.argv[1:])
