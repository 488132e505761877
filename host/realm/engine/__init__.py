"""The engine: scheduler, paged KV cache, model runner and sampling.

Importing it sets libgomp's waiting (see :mod:`realm.engine.environment`), which must come before torch.
"""

from realm.engine.environment import prepare_this_process

prepare_this_process()
