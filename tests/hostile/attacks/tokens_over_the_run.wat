;; Forwards 10 tokens at a time with 16 for the run. The second is refused with LIMIT; ends as over its token limit.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $s i32) (local $c i32)
    (local.set $s (call $seq_new))
    (loop $l (br_if $l (i32.ge_s (local.tee $c (call $forward (local.get $s) (i32.const 0) (i32.const 10) (i32.const 0) (i32.const 0))) (i32.const 0))))
    (local.get $c)))
