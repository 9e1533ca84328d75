# Decides whether the CUDA kernels are built, by nvcc alone, never by a GPU: a package is built for
# other machines, too. Also runs as a script (cmake -P), which only says what it finds.
#   DLA_BUILD_CUDA  1: it is an error if they cannot; 0: they are not; empty: they are if nvcc can
#   DLA_CUDA_ARCHS  compute capabilities, "80;90" say; the newest also as PTX, for GPUs to come
#   DLA_CUDA_FAILED setup.py's reason to do without them, after an attempt
# Sets DLA_WITHOUT_CUDA (the reason) or else DLA_NVCC, DLA_NVCC_VERSION and DLA_CUDA_ARCHS.
set(oldest_nvcc 12.0) # 12.8 for compute capability 100, a default; 13.0 is what has been tried

foreach(name IN ITEMS DLA_BUILD_CUDA DLA_CUDA_ARCHS)
  if(NOT DEFINED ${name})
    set(${name} "$ENV{${name}}")
  endif()
endforeach()
if(NOT DLA_CUDA_ARCHS)
  set(DLA_CUDA_ARCHS 75 80 90 100)
endif()
string(REGEX REPLACE "[ ,]+" ";" DLA_CUDA_ARCHS "${DLA_CUDA_ARCHS}")
list(SORT DLA_CUDA_ARCHS COMPARE NATURAL)

# The reason why there can be no CUDA kernels, or nothing.
function(look_for_nvcc reason)
  find_program(DLA_NVCC NAMES $ENV{CUDACXX} nvcc NO_CACHE
    PATHS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
  if(NOT DLA_NVCC)
    set(${reason} "no nvcc was found when dla-kernels was built" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND "${DLA_NVCC}" --version OUTPUT_VARIABLE said ERROR_QUIET)
  if(NOT said MATCHES "release ([0-9]+\\.[0-9]+)")
    set(${reason} "${DLA_NVCC} did not report its version" PARENT_SCOPE)
    return()
  endif()
  set(version "${CMAKE_MATCH_1}")
  if(version VERSION_LESS oldest_nvcc)
    set(${reason} "${DLA_NVCC} is of CUDA ${version}, older than ${oldest_nvcc}" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND "${DLA_NVCC}" --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET)
  foreach(arch IN LISTS DLA_CUDA_ARCHS)
    if(NOT known MATCHES "compute_${arch}[^0-9a-z]")
      string(CONCAT text "${DLA_NVCC} of CUDA ${version} cannot build for compute capability "
        "${arch} of DLA_CUDA_ARCHS (100 needs CUDA 12.8)")
      set(${reason} "${text}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  set(DLA_NVCC "${DLA_NVCC}" PARENT_SCOPE)
  set(DLA_NVCC_VERSION "${version}" PARENT_SCOPE)
endfunction()

if(DLA_CUDA_FAILED)
  set(DLA_WITHOUT_CUDA "${DLA_CUDA_FAILED}")
elseif(DLA_BUILD_CUDA STREQUAL "0")
  set(DLA_WITHOUT_CUDA "DLA_BUILD_CUDA was 0 when dla-kernels was built")
else()
  look_for_nvcc(DLA_WITHOUT_CUDA)
endif()
if(NOT DLA_WITHOUT_CUDA)
  message(STATUS "CUDA kernels for ${DLA_CUDA_ARCHS}, by ${DLA_NVCC} of CUDA ${DLA_NVCC_VERSION}")
elseif(DLA_BUILD_CUDA STREQUAL "1")
  message(FATAL_ERROR "dla-kernels: DLA_BUILD_CUDA=1, but the CUDA kernels cannot be built: "
    "${DLA_WITHOUT_CUDA}. Put the nvcc of CUDA 12.8 or newer on PATH, or name it by CUDACXX; "
    "without DLA_BUILD_CUDA=1 the package does without CUDA kernels.")
else()
  message(STATUS "No CUDA kernels: ${DLA_WITHOUT_CUDA}")
endif()
