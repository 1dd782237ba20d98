"""llama.cpp as an engine of upstream exo: put this folder into ``exo/worker/engines/``, see the README beside it."""

import exo_llama_cpp

exo_llama_cpp.extend()
