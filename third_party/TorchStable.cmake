# Imported target `torch_stable`: the headers and libtorch.so of the torch that the build's Python sees.
# find_package(Torch) is left out on purpose: it drags in a CUDA torch's toolkit search and flags.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
  OUTPUT_VARIABLE TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
if(NOT EXISTS "${TORCH_ROOT}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "grinqh._ops needs torch >= 2.11 in ${Python_EXECUTABLE} (found: '${TORCH_ROOT}')")
endif()

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${TORCH_ROOT}/include")
# Its headers name their files in error texts. Last on the command line, as the last prefix that fits counts:
# torch may lie inside our own folder.
target_compile_options(torch_stable INTERFACE "-ffile-prefix-map=${TORCH_ROOT}/include/=")
# 2.11.0, the oldest torch that may load the result.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000ULL)
# libtorch.so needs libtorch_cpu.so, and libtorch_cuda.so too in a CUDA build of torch, so this one entry
# brings the right backend's symbols into scope. It is found by its name, torch being loaded: no rpath.
target_link_options(torch_stable INTERFACE "LINKER:--no-as-needed,${TORCH_ROOT}/lib/libtorch.so,--as-needed")
