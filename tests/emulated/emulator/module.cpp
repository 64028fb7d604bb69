// The CUDA kernels on the emulator, as a module with the names of fastlora._core, and the emulator's own controls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind.h"
#include "emulator.h"
#include "samples.h"

namespace py = pybind11;

PYBIND11_MODULE(_emulated, m) {
    fastlora::bind_cuda(m);
    m.def(
        "set_schedule", [](int schedule) { emulator::schedule = schedule; }, py::arg("schedule"),
        "0: threads in order, 1: in reverse, others: shuffled by this seed");
    m.def(
        "set_shared_limit", [](size_t bytes) { emulator::shared_limit = bytes; }, py::arg("bytes"),
        "shared memory that a block of the device in use may have; each size is a device of its own");
    m.def(
        "set_has_code", [](bool has_code) { emulator::has_code = has_code; }, py::arg("has_code"),
        "whether the device runs the code of this build");
    m.def("last_error", [] { return int(emulator::last_error); }, "an error that nobody has taken yet");
    m.def(
        "shared_settings",
        [] {
            const std::lock_guard guard(emulator::attribute_lock);
            return emulator::settings;
        },
        "limits of dynamic shared memory that launches asked for, in their order");
    m.def(
        "skip_barrier",
        [](int barrier, bool of_warp) {
            (of_warp ? emulator::skipped_warp_barrier : emulator::skipped_barrier) = barrier;
        },
        py::arg("barrier"), py::arg("of_warp"), "which barrier of every thread is left out, counted from 0; -1: none");
    m.def(
        "barriers",
        [](bool of_warp) {
            const emulator::Thread& thread = emulator::block.threads.at(0);
            return of_warp ? thread.warp_barriers : thread.barriers;
        },
        py::arg("of_warp"), "how many barriers thread 0 of the last block came to");
    m.def(
        "run_sample", [](const char* name) { return emulator::run_sample(name); }, py::arg("name"),
        "what went wrong in a small kernel of samples.cpp, or nothing");
}
