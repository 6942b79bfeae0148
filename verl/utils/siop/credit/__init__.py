"""The method: rollouts → clusters → target → support → turn rewards → advantages. Knows no service.

Importing anything of this room registers the built-in credit methods and baselines.
"""

import verl.utils.siop.credit.baselines
import verl.utils.siop.credit.methods  # noqa: F401
