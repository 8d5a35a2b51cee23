# Which nvcc compiles the CUDA kernels, and whether it can: the one that the user names, else the first in PATH, else
# the one in the usual folders. A named one is never passed over for another.

set(CPC_EXT_NVCC_SECONDS 120 CACHE STRING "How long nvcc may take to answer")
mark_as_advanced(CPC_EXT_NVCC_SECONDS)

# Ends the configuration, because of an nvcc that does not work. A build for the CPU instead would go unnoticed, as pip
# shows no output of what succeeds, and whoever has an nvcc wants its kernels: where CUDA is not wanted, one word says so.
function(stop_for_nvcc what)
  message(FATAL_ERROR "cpc_ext: ${what}\n"
                      "Name another nvcc with CUDACXX=/path/to/nvcc, or build without CUDA: "
                      "pip install . -C cmake.define.CPC_EXT_CUDA=OFF")
endfunction()

# What a command with nvcc prints; stops where it fails.
function(ask_nvcc result)
  list(JOIN ARGN " " command)
  execute_process(COMMAND ${ARGN} TIMEOUT ${CPC_EXT_NVCC_SECONDS} RESULT_VARIABLE status OUTPUT_VARIABLE output
                  ERROR_VARIABLE output INPUT_FILE /dev/null)
  if(status MATCHES "timeout")
    stop_for_nvcc("nvcc did not answer within ${CPC_EXT_NVCC_SECONDS} seconds: ${command}")
  elseif(NOT status EQUAL 0)
    string(STRIP "${output}" output)
    stop_for_nvcc("nvcc does not work (${status}): ${command}\n${output}")
  endif()
  set(${result} "${output}" PARENT_SCOPE)
endfunction()

# Sets nvcc to its path and version to its release; or nvcc to nothing and reason to why there is none. CMake's own
# CMAKE_CUDA_COMPILER, and the flags that CUDACXX may bring, are set for enable_language(CUDA).
function(find_nvcc nvcc version reason)
  # enable_language leaves its choice in the cache, where it looks as if the user had named it.
  if(CMAKE_CUDA_COMPILER AND NOT CMAKE_CUDA_COMPILER STREQUAL CPC_EXT_NVCC_FOUND)
    set(who CMAKE_CUDA_COMPILER)
    set(name ${CMAKE_CUDA_COMPILER})
  elseif(NOT "$ENV{CUDACXX}" STREQUAL "")
    set(who CUDACXX)
    separate_arguments(name UNIX_COMMAND "$ENV{CUDACXX}")
  elseif(NOT "$ENV{CUDA_HOME}" STREQUAL "")
    set(who CUDA_HOME)
    set(name $ENV{CUDA_HOME}/bin/nvcc)
  elseif(NOT "$ENV{CUDA_PATH}" STREQUAL "")
    set(who CUDA_PATH)
    set(name $ENV{CUDA_PATH}/bin/nvcc)
  endif()

  unset(found)
  if(who)
    list(POP_FRONT name program)
    set(flags ${name})
    # CMake's rules for compilers: a path, or a name in PATH.
    find_program(found ${program} PATHS ENV PATH NO_DEFAULT_PATH NO_CACHE)
    set(because "the nvcc that ${who} names, ${program},")
  else()
    find_program(found nvcc PATHS ENV PATH NO_DEFAULT_PATH NO_CACHE)
    if(NOT found)
      find_program(found nvcc PATHS /usr/local/cuda/bin /opt/cuda/bin NO_DEFAULT_PATH NO_CACHE)
    endif()
    set(because "${found}")
  endif()

  set(${nvcc} "" PARENT_SCOPE)
  if(NOT found)
    set(${reason} "no nvcc found" PARENT_SCOPE)
    if(who)
      set(${reason} "${because} is not there, or not a program" PARENT_SCOPE)
    endif()
    return()
  endif()

  ask_nvcc(answer ${found} --version)
  if(NOT answer MATCHES "release ([0-9]+\\.[0-9]+)")
    string(STRIP "${answer}" answer)
    stop_for_nvcc("nvcc does not tell its release: ${found} --version\n${answer}")
  endif()
  set(release ${CMAKE_MATCH_1})
  if(release VERSION_LESS 12.4)
    set(${reason} "${because} is release ${release}, older than 12.4" PARENT_SCOPE)
    return()
  endif()

  # A whole small kernel, once for each nvcc: the host's compiler may be too new for it.
  set(host $ENV{CUDAHOSTCXX})
  if(CMAKE_CUDA_HOST_COMPILER)
    set(host ${CMAKE_CUDA_HOST_COMPILER})
  endif()
  file(TIMESTAMP ${found} changed)
  set(tried "${found}@${changed}@${flags}@${CMAKE_CUDA_FLAGS}@${host}")
  if(NOT CPC_EXT_NVCC_TRIED STREQUAL tried)
    set(folder ${CMAKE_CURRENT_BINARY_DIR}/nvcc)
    file(WRITE ${folder}/kernel.cu "#include <type_traits>\n__global__ void kernel(int* out) { *out = 1; }\n")
    separate_arguments(options UNIX_COMMAND "${CMAKE_CUDA_FLAGS} $ENV{CUDAFLAGS}")
    if(host)
      list(APPEND options -ccbin ${host})
    endif()
    ask_nvcc(_ ${found} ${flags} ${options} -std=c++20 -c ${folder}/kernel.cu -o ${folder}/kernel.o)
    set(CPC_EXT_NVCC_TRIED "${tried}" CACHE INTERNAL "The nvcc that was tried, and with what")
  endif()

  if(NOT who STREQUAL CMAKE_CUDA_COMPILER)
    if(CPC_EXT_NVCC_FOUND AND NOT CPC_EXT_NVCC_FOUND STREQUAL found)
      # Another one than last time: CMake is to look at it anew.
      file(REMOVE ${CMAKE_PLATFORM_INFO_DIR}/CMakeCUDACompiler.cmake)
    endif()
    unset(CMAKE_CUDA_COMPILER CACHE)
    set(CPC_EXT_NVCC_FOUND ${found} CACHE INTERNAL "The nvcc that was found, not named to CMake")
    list(JOIN flags " " flags)
    set(CMAKE_CUDA_COMPILER ${found} ${flags} PARENT_SCOPE)
  endif()
  set(${nvcc} ${found} PARENT_SCOPE)
  set(${version} ${release} PARENT_SCOPE)
endfunction()
