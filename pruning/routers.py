"""What may become of a router that loses experts: refused before any work."""

from moe_spec.errors import UserError, did_you_mean
from moe_spec.layer_plan import DROP_ROUTERS, UNTOUCHED


def check_router(router: str, *, clamp_top_k: bool) -> None:
    """Refuse what cannot become of a router that loses experts.

    Raises:
        UserError: none of ``DROP_ROUTERS``, or a K that shall shrink under a router that stays as it is.
    """
    if router not in DROP_ROUTERS:
        raise UserError(
            f"{router!r} is no router of a plan that drops experts", hint=did_you_mean(router, DROP_ROUTERS)
        )
    check_clamp(router, clamp_top_k=clamp_top_k)


def check_clamp(router: str, *, clamp_top_k: bool) -> None:
    """Refuse to let K shrink under a router that stays as it is.

    Raises:
        UserError: it shall.
    """
    if router in UNTOUCHED and clamp_top_k:
        raise UserError(
            f"--clamp-top-k lets K shrink, but --router {router} leaves it as it is",
            hint=f"leave out one of the two: with --router {router} fewer than K experts may be kept as it is",
        )
