"""Which decoder a session gets."""

from collections.abc import Sequence

from edgepeft.bundle.manifest import Manifest
from edgepeft.runtime.activation import is_decoder
from edgepeft.runtime.cache import cache_specs
from edgepeft.runtime.decoding.base import Decoder
from edgepeft.runtime.decoding.growing import GrowingDecoder
from edgepeft.runtime.decoding.in_place import InPlaceDecoder
from edgepeft.runtime.decoding.streamed import StreamedDecoder
from edgepeft.runtime.decoding.whole_text import EncoderDecoder, whole_text
from edgepeft.runtime.memory.inference import RunPlan
from edgepeft.runtime.session import GraphSession
from edgepeft.runtime.streamed import StreamedModel


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
