"""A function of ours around one of verl's: a plain function, which is pickled as verl's own would be.

Ray pickles a class by value, with the globals that its methods use, where the class is decorated with ray.remote or defined
in `__main__`. So verl's functions travel in other people's task runners, and whatever stands in their place has to. A proxy
object, such as wrapt makes, cannot be pickled. A plain function that bears verl's module and name is pickled by reference:
the process at the other end gets what stands there under that name, which is verl's own where the plugin is not loaded.
"""

import functools
import sys
from collections.abc import Callable
from types import ModuleType


def wrap(owner: ModuleType | type, name: str, around: Callable) -> None:
    """Put `around` in the place of the function `name` of a module or class.

    Args:
        owner: where the function is defined. Modules that have already imported it by name get the new one, too.
        name: of the function.
        around: called with verl's function and then the arguments of the call; its result is the call's.
    """
    verls = getattr(owner, name)

    @functools.wraps(verls)
    def wrapped(*args, **kwargs):
        return around(verls, *args, **kwargs)

    setattr(owner, name, wrapped)
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is verls:
            setattr(module, name, wrapped)
