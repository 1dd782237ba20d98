# Read by CMake right after vendor/llama.cpp's own project() call. The bindings force the "common" helper library
# on; nothing here uses it, and it is a quarter of the build.
set(LLAMA_BUILD_COMMON OFF)
