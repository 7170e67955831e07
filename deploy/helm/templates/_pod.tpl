{{- /*
What every pod template takes from its part's values. Arguments: root, part, values (of the part), and where they
apply: holds (a label), hook (the pod isn't replaced for a new Secret, and has no account of the chart's), token (KubeRay
gives it an account), spread (over zones and nodes).
*/ -}}
{{- define "backpack.podMetadata" -}}
{{- $labels := include "backpack.selector" . | fromYaml }}
{{- with .holds }}{{ $_ := set $labels "backpack/holds" . }}{{ end }}
{{- $annotations := dict }}
{{- if not .hook }}{{ with .root.Values.secretVersion }}{{ $_ := set $annotations "backpack/secret-version" . }}{{ end }}{{ end }}
labels: {{- toYaml (merge $labels (.values.podLabels | default dict) .root.Values.podLabels .root.Values.commonLabels) | nindent 2 }}
{{- with merge $annotations (.values.podAnnotations | default dict) .root.Values.podAnnotations .root.Values.commonAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "backpack.serviceAccountName" -}}
{{- $account := .root.Values.serviceAccount }}
{{- .values.serviceAccountName | default (and (not .hook) (not .token) ($account.name | default (ternary (include "backpack.prefix" .root) "" $account.create))) | default "" }}
{{- end }}

{{- define "backpack.podSpec" -}}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: [{{ range $i, $name := . }}{{ if $i }}, {{ end }}{name: {{ $name }}}{{ end }}]
{{- end }}
{{- with include "backpack.serviceAccountName" . }}
serviceAccountName: {{ . }}
{{- end }}
{{- if not .token }}
automountServiceAccountToken: {{ .root.Values.serviceAccount.automountToken }}
{{- end }}
enableServiceLinks: false
securityContext: {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- if .values.topologySpreadConstraints }}
topologySpreadConstraints: {{- toYaml .values.topologySpreadConstraints | nindent 2 }}
{{- else if .spread }}
{{- include "backpack.spread" . }}
{{- end }}
{{- range $name := list "nodeSelector" "tolerations" "affinity" "priorityClassName" "runtimeClassName" "schedulerName" }}
{{- with get $.values $name }}
{{ $name }}: {{ toJson . }}
{{- end }}
{{- end }}
{{- with .values.initContainers }}
initContainers: {{- include "backpack.containers" (dict "root" $.root "containers" .) | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Over zones and nodes. By template hash, where pods have one: a rollout's old pods don't count. */ -}}
{{- define "backpack.spread" }}
topologySpreadConstraints:
  {{- $p := . }}
  {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "backpack.selector" $p | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
  {{- end }}
{{- end }}

{{- define "backpack.security" -}}{{ toYaml .root.Values.securityContext }}{{- end }}

{{- /*
Containers of the operator's, beside ours. Without a securityContext they get ours, so that `restricted` holds; the rest
is as Kubernetes' own types write it (see backpack.quantity).
*/ -}}
{{- define "backpack.containers" -}}
{{- range .containers }}
{{- $container := deepCopy . }}
{{- if not $container.securityContext }}{{ $_ := set $container "securityContext" (include "backpack.security" $ | fromYaml) }}{{ end }}
{{- $_ := set $container "resources" (include "backpack.resources" ($container.resources | default dict) | fromYaml) }}
{{- if $container.env }}{{ $_ := set $container "env" (include "backpack.environmentOf" $container.env | fromYamlArray) }}{{ end }}
- {{ toYaml $container | nindent 2 | trim }}
{{- end }}
{{- end }}

{{- /* Variables as Kubernetes' own types write them: an empty value is none. */ -}}
{{- define "backpack.environmentOf" -}}
{{- range . }}
- {{ toJson (ternary (omit . "value") . (eq (toString (get . "value")) "")) }}
{{- end }}
{{- end }}

{{- /* The chart's variables (`own`, YAML) and the operator's. A name that is there twice is an error to Kubernetes. */ -}}
{{- define "backpack.variables" -}}
{{- $names := dict }}
{{- range .own | fromYamlArray }}{{ $_ := set $names .name true }}{{ end }}
{{- range .values.extraEnv }}
{{- if hasKey $names .name }}
{{- fail (printf "%s.extraEnv: %s is set by the chart or by `settings`, or is there twice" $.at .name) }}
{{- end }}
{{- $_ := set $names .name true }}
{{- end }}
env: {{- trim .own | nindent 2 }}
{{- with .values.extraEnv }}{{ include "backpack.environmentOf" . | indent 2 }}{{ end }}
{{- with .values.envFrom }}
envFrom: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /*
Not serving while there is no replica, or no news of releases, is no reason to restart: liveness is a port that is open.
Kubernetes' own gRPC probe knows no TLS. The values' numbers go over these.
*/ -}}
{{- define "backpack.probes" -}}
{{- $tls := .root.Values.tls.secret }}
{{- $ready := dict "periodSeconds" 5 "timeoutSeconds" 5 }}
{{- if $tls }}{{ $ready = dict "periodSeconds" 10 "timeoutSeconds" 10 }}{{ end }}
readinessProbe:
  {{- if $tls }}
  exec: {command: [backpack, health, "127.0.0.1:{{ .port }}"]}
  {{- else }}
  grpc: {port: {{ .port }}}
  {{- end }}
  {{- toYaml (mergeOverwrite $ready .values.readinessProbe) | nindent 2 }}
startupProbe:
  tcpSocket: {port: grpc}
  {{- toYaml .values.startupProbe | nindent 2 }}
livenessProbe:
  tcpSocket: {port: grpc}
  {{- toYaml .values.livenessProbe | nindent 2 }}
{{- end }}

{{- /* How long a start may wait for what isn't there yet: as the startup probe allows, less what it takes besides. */ -}}
{{- define "backpack.startWait" -}}
{{- $probe := .values.startupProbe }}
{{- max 0 (sub (mul (int $probe.periodSeconds) (int $probe.failureThreshold)) 20) }}
{{- end }}
