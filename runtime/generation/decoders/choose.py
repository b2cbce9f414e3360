"""Which decoder a session gets."""

from collections.abc import Sequence

from edgepeft.bundle.manifest import Manifest

from ...adapters.graph_inputs import is_decoder
from ...key_value_cache import cache_specs
from ...memory.inference import RunPlan
from ...session import GraphSession
from ...streamed_model import StreamedModel
from .base import Decoder
from .growing import GrowingDecoder
from .in_place import InPlaceDecoder
from .streamed import StreamedDecoder
from .whole_text import EncoderDecoder, whole_text


def decoder_for(
    session: GraphSession | StreamedModel, manifest: Manifest, plan: RunPlan, capacities: Sequence[int]
) -> Decoder:
    """A decoder over a session.

    Args:
        session: with bindings of its own, an adapter's inputs among them.
        manifest: the bundle's manifest.
        plan: that the session was opened for.
        capacities: tokens that each row reads at most.
    """
    if manifest.task == "text2text-generation":
        assert isinstance(session, GraphSession)  # an encoder-decoder has no stages
        return EncoderDecoder(session, manifest, len(capacities))
    if not cache_specs(manifest):
        return whole_text(session, manifest, len(capacities))
    if is_decoder(manifest, plan.role):
        assert isinstance(session, GraphSession)
        return InPlaceDecoder(session, manifest, len(capacities), max(capacities), plan.chunk)
    if isinstance(session, StreamedModel):
        return StreamedDecoder(session, manifest, capacities, plan.chunk)
    return GrowingDecoder(session, len(capacities))
