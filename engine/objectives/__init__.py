"""Each objective is a function of views that returns named terms."""

from .composed import text_guided_retrieval
from .itc import image_text_contrast
from .itm import PRIOR, image_text_matching
from .masked_words import MaskedWords
from .masks import RunMasks, Seen
from .mim import masked_image_modelling
from .mlm import masked_language_modelling
from .own import ObjectiveView
from .recognition import recognise
from .views import Keys, StudentView, TeacherView, Terms, look

__all__ = [
    "PRIOR",
    "Keys",
    "MaskedWords",
    "ObjectiveView",
    "RunMasks",
    "Seen",
    "StudentView",
    "TeacherView",
    "Terms",
    "image_text_contrast",
    "image_text_matching",
    "look",
    "masked_image_modelling",
    "masked_language_modelling",
    "recognise",
    "text_guided_retrieval",
]
