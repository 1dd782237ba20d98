# CMake reads this file right after vendor/llama.cpp's own project() call.

# The bindings force the "common" helper library on. Nothing here uses it, and it is a quarter of the build.
set(LLAMA_BUILD_COMMON OFF)

# GCC 12 drops the stores to AMX's tile configuration, so llama.cpp's AMX code dies of an illegal instruction on Xeons
# that have it. No other processor does.
if(CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64")
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-mno-amx-int8>)
endif()

# The wheel carries its own libgomp: a machine or container without a compiler often has none. The libraries beside it
# look for it in their own folder first.
if(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  execute_process(
    COMMAND "${CMAKE_CXX_COMPILER}" -print-file-name=libgomp.so.1
    OUTPUT_VARIABLE LIBGOMP
    OUTPUT_STRIP_TRAILING_WHITESPACE)
  get_filename_component(LIBGOMP "${LIBGOMP}" REALPATH)
  if(EXISTS "${LIBGOMP}")
    install(FILES "${LIBGOMP}" DESTINATION "${SKBUILD_PLATLIB_DIR}/llama_cpp/lib" RENAME libgomp.so.1)
  endif()
endif()

# The multimodal library, for pictures in prompts, without its functions for files, sound and video. Most of it builds
# graphs that ggml computes, and needs little optimisation. It takes 16 CPU seconds of 200 to compile, and 970 kB.
if(NOT EMSCRIPTEN)
  set(MTMD "${CMAKE_CURRENT_SOURCE_DIR}/tools/mtmd")
  file(GLOB MTMD_MODELS "${MTMD}/models/*.cpp")
  set(MTMD_OWN "${MTMD}/clip.cpp" "${MTMD}/mtmd.cpp" "${MTMD}/mtmd-image.cpp" "${MTMD}/mtmd-audio.cpp")
  set_source_files_properties(${MTMD_OWN} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
  set_source_files_properties("${MTMD}/mtmd-image.cpp" PROPERTIES COMPILE_OPTIONS -O2) # scales pictures
  add_library(exo-mtmd SHARED ${MTMD_OWN} ${MTMD_MODELS})
  target_compile_features(exo-mtmd PRIVATE cxx_std_17)
  target_compile_definitions(exo-mtmd PRIVATE LLAMA_BUILD LLAMA_SHARED)
  target_compile_options(exo-mtmd PRIVATE -O1)
  target_include_directories(exo-mtmd PRIVATE "${MTMD}" "${CMAKE_CURRENT_SOURCE_DIR}/include")
  target_link_libraries(exo-mtmd PRIVATE ggml llama)
  set_target_properties(exo-mtmd PROPERTIES OUTPUT_NAME mtmd UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 12)
  if(APPLE)
    set_target_properties(exo-mtmd PROPERTIES INSTALL_RPATH "@loader_path")
  else()
    set_target_properties(exo-mtmd PROPERTIES INSTALL_RPATH "$ORIGIN")
  endif()
  install(TARGETS exo-mtmd LIBRARY DESTINATION "${SKBUILD_PLATLIB_DIR}/llama_cpp/lib")
endif()

# The RPC back end is a plug-in in the wheel. Models that are divided among hosts load it, and tests of devices. It takes
# 4 CPU seconds of 200 to compile, and 190 kB.
if(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND NOT GGML_RPC)
  set(RPC "${CMAKE_CURRENT_SOURCE_DIR}/ggml/src/ggml-rpc")
  add_library(exo-rpc MODULE "${RPC}/ggml-rpc.cpp" "${RPC}/transport.cpp")
  target_compile_features(exo-rpc PRIVATE cxx_std_17)
  target_compile_definitions(exo-rpc PRIVATE GGML_BACKEND_DL GGML_BACKEND_BUILD GGML_BACKEND_SHARED)
  target_include_directories(exo-rpc PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/ggml/src")
  target_link_libraries(exo-rpc PRIVATE ggml-base)
  set_target_properties(exo-rpc PROPERTIES OUTPUT_NAME ggml-rpc INSTALL_RPATH "$ORIGIN")
  install(TARGETS exo-rpc LIBRARY DESTINATION "${SKBUILD_PLATLIB_DIR}/llama_cpp/lib")
endif()
