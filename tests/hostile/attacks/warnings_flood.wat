;; Makes 20,000 mistakes that the host warns of. It warns of some only.
(module
  (import "realm" "seq_len" (func $seq_len (param i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $i i32)
    (loop $l
      (drop (call $seq_len (i32.const 77)))
      (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 20000))))
    (i32.const 0)))
