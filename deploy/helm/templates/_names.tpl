{{- /* The release's name is the prefix of every object's. */ -}}
{{- define "backpack.name" -}}{{ printf "%s-%s" .root.Release.Name .part | trunc 60 | trimSuffix "-" }}{{- end }}

{{- define "backpack.selector" -}}
app.kubernetes.io/name: backpack
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "backpack.labels" -}}
{{ include "backpack.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- /* How dashboard and alerts tell this one from others that the same Prometheus watches. */ -}}
{{- define "backpack.installation" -}}{{ .Release.Namespace }}/{{ .Release.Name }}{{- end }}

{{- define "backpack.image" -}}
{{ .root.Values.image.registry }}backpack-{{ .part }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "backpack.pullSecrets" -}}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: [{{ range $i, $name := . }}{{ if $i }}, {{ end }}{name: {{ $name }}}{{ end }}]
{{- end }}
{{- end }}

{{- define "backpack.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "backpack.security" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{- /* Environment of one process: what the chart decides, then the operator's settings, then secrets by reference. */ -}}
{{- define "backpack.environment" -}}
{{- $own := .own | default dict }}
{{- $tls := .root.Values.tls }}
{{- $_ := set $own "drain" .root.Values.drainSeconds }}
{{- if $tls.secret }}
{{- $_ := merge $own (dict "tls_certificate" "/tls/tls.crt" "tls_key" "/tls/tls.key" "tls_ca" "/tls/ca.crt" "tls_name" $tls.name) }}
{{- if has .part $tls.clientCertificates }}{{ $_ := set $own "tls_client_ca" "/tls/ca.crt" }}{{ end }}
{{- end }}
{{- /* toJson: toString would write large numbers as 6.7e+07. */ -}}
{{- range $name, $value := merge (deepCopy $own) .root.Values.settings }}
- {name: BACKPACK_{{ $name | upper }}, value: {{ kindIs "string" $value | ternary $value (toJson $value) | quote }}}
{{- end }}
{{- if .root.Values.model.claim }}
- {name: BACKPACK_MODEL, value: {{ printf "/models/%s" .root.Values.model.path | trimSuffix "/" | quote }}}
{{- end }}
{{- range $setting, $key := .secrets }}
- name: {{ $setting }}
  valueFrom: {secretKeyRef: {name: {{ $.root.Values.secret }}, key: {{ $key }}}}
{{- end }}
{{- end }}

{{- define "backpack.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: state, mountPath: /var/lib/backpack}
{{- if .root.Values.model.claim }}
- {name: model, mountPath: /models, readOnly: true}
{{- end }}
{{- if .root.Values.tls.secret }}
- {name: tls, mountPath: /tls, readOnly: true}
{{- end }}
{{- end }}

{{- define "backpack.volumes" -}}
- {name: tmp, emptyDir: {}}
- {name: state, emptyDir: {}}
{{- if .root.Values.model.claim }}
- name: model
  persistentVolumeClaim: {claimName: {{ .root.Values.model.claim }}, readOnly: true}
{{- end }}
{{- with .root.Values.tls.secret }}
- name: tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{- /* What calls PostgreSQL has its authorities, if they are given. */ -}}
{{- define "backpack.databaseMounts" -}}
{{- if .root.Values.database.authorities }}
- {name: database, mountPath: /database, readOnly: true}
{{- end }}
{{- end }}

{{- define "backpack.databaseVolumes" -}}
{{- with .root.Values.database.authorities }}
- name: database
  configMap: {name: {{ . }}}
{{- end }}
{{- end }}

{{- define "backpack.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- end }}

{{- /* Over zones and nodes. By template hash, where pods have one: a rollout's old pods don't count. */ -}}
{{- define "backpack.spread" -}}
{{- $p := . -}}
topologySpreadConstraints:
  {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "backpack.selector" $p | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
  {{- end }}
{{- end }}

{{- define "backpack.podAnnotations" -}}
{{- with .root.Values.secretVersion }}
annotations: {backpack/secret-version: {{ . | quote }}}
{{- end }}
{{- end }}

{{- /* Kubernetes goes on sending connections for a moment after it has decided to stop a pod. */ -}}
{{- define "backpack.lifecycle" -}}
preStop:
  exec: {command: [sleep, "5"]}
{{- end }}

{{- /* The pause above, then the drain, then those that were told to retry. */ -}}
{{- define "backpack.graceSeconds" -}}
{{ add 5 .root.Values.drainSeconds 15 }}
{{- end }}

{{- /*
Not serving while there is no replica, or no news of releases, is no reason to restart: liveness is a port that is open.
Kubernetes' own gRPC probe knows no TLS.
*/ -}}
{{- define "backpack.probes" -}}
{{- if .root.Values.tls.secret }}
readinessProbe:
  exec: {command: [backpack, health, "127.0.0.1:{{ .port }}"]}
  periodSeconds: 10
  timeoutSeconds: 10
{{- else }}
readinessProbe:
  grpc: {port: {{ .port }}}
  periodSeconds: 5
  timeoutSeconds: 5
{{- end }}
startupProbe:
  tcpSocket: {port: grpc}
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  tcpSocket: {port: grpc}
  periodSeconds: 10
  timeoutSeconds: 5
{{- end }}

{{- /* An eviction may always take pods that aren't ready: otherwise gateways without replicas would hold up a node's drain. */ -}}
{{- define "backpack.budget" -}}
maxUnavailable: 1
unhealthyPodEvictionPolicy: AlwaysAllow
{{- end }}
