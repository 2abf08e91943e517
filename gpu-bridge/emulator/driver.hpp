// Between the emulated libraries: how one of them puts work on a stream of the other.

#pragma once
#include <functional>

// Puts work on a stream; returns a CUresult.
extern "C" int cairn_emulator_enqueue(void* stream, std::function<int()>* work);
