// The threads that all kernels share.
#pragma once

namespace fastlora {

// Calls work(context, thread, threads) on a team of at most `threads` threads, the caller's as thread 0 among them, and
// returns when all are done. `threads` of a call may be less than was asked for: one, while another caller has the
// team. Work must not throw.
void run_team(int threads, void (*work)(void* context, int thread, int threads), void* context);

}  // namespace fastlora
