"""Stage 5: say what to do. A recipe as data, and its reading on a ModelSpec."""

from lighten.recipe.notes import notes
from lighten.recipe.predict import apply_recipe
from lighten.recipe.recipe import Recipe, Step, parse_recipe, read_recipe
from lighten.recipe.steps import STEPS
from lighten.recipe.targets import RUNTIMES

__all__ = ["RUNTIMES", "STEPS", "Recipe", "Step", "apply_recipe", "notes", "parse_recipe", "read_recipe"]
