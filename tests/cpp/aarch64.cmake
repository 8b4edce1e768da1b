# 64-bit Arm Linux programs from another machine (Debian: g++-aarch64-linux-gnu), run there under qemu-user:
#   cmake -B build/arm -DCMAKE_TOOLCHAIN_FILE=tests/cpp/aarch64.cmake -DSPARSE_RUN_PYTHON=OFF -DSPARSE_RUN_TESTS=ON
#   cmake --build build/arm && ctest --test-dir build/arm
# Linked statically, so that the programs need nothing of the target but its kernel and can be copied to a board.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -cpu max)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
